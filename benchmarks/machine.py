"""What a number was measured on: device, processor, versions, commit, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import fastmask
from fastmask.torch_path.gemm import by_onednn

__all__ = ["ROOT", "commit_of", "described", "one_line", "processor"]

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit_of(root: Path) -> str | None:
    """The commit of the checkout, with a plus if files differ from it; None where git does not say."""
    try:
        ask = ["git", "-C", str(root)]
        head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def described(device: torch.device) -> dict[str, str]:
    """The columns of a row that say where it comes from; empty text for what is not known."""
    commit = commit_of(ROOT) or ""
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fastmask": fastmask.__version__,
        "products": _products(device),
        "commit": commit[:12] + commit[40:],
        "date": date.today().isoformat(),
    }


def one_line(described: dict[str, str], threads: int) -> str:
    """The machine as tables name it."""
    parts = [described["processor"], f"{threads} thread{'s' * (threads > 1)}", f"PyTorch {described['torch']}"]
    return ", ".join([*parts, f"fastmask {described['fastmask']} ({described['commit']})", described["date"]])


def _products(device: torch.device) -> str:
    """What fastmask multiplies float32 matrices with on a CPU: "torch", or "onednn" where that is faster."""
    if device.type != "cpu":
        return ""
    return "onednn" if by_onednn(torch.zeros(1)) else "torch"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
