"""The processor by name: numbers and choices that were measured on one say nothing of another."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_fields(info: Path = CPUINFO) -> dict[str, str]:
    """What Linux says of the first processor, by name ("model name", "cpu family", ...); empty elsewhere."""
    if not info.is_file():
        return {}
    lines = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor(info: Path = CPUINFO) -> str:
    """The CPU by name, and by family and model: virtual machines call all of a maker's processors alike."""
    known = cpu_fields(info)
    if not known:
        return platform.processor() or platform.machine()
    numbers = f"family {known.get('cpu family', '?')}, model {known.get('model', '?')}"
    return f"{known.get('model name', platform.machine())} ({numbers})"
