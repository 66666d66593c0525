"""Block sizes measured on this machine, in place of those shipped: `python -m fastmask_kernels.autotune` finds them.

They are kept on disk, by chip, kernel, dtypes and sizes; never by what a mask holds: dynamic subnetworks change masks
every few steps, and a launch must not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastmask_kernels.configs import Config
from fastmask_kernels.launching import forget
from fastmask_kernels.plan import Plan

__all__ = ["cache_file", "problem", "remember", "tuned"]

_FORMAT = 2  # of the file; one of another format is ignored


def cache_file() -> Path:
    """Where measured block sizes are kept: fastmask/tuned.json in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastmask" / "tuned.json"


def problem(
    kernel: str, x: Tensor, weight_dtype: torch.dtype | None, sizes: Sequence[int], plan: Plan, allow_tf32: bool
) -> str:
    """The name under which a launch is remembered: the same for batches of about as many tokens and languages."""
    chip = torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"
    tokens, languages = (size.bit_length() for size in (plan.n_rows, plan.present.shape[0]))
    dtypes = f"{x.dtype}/{weight_dtype}/{'tf32' if allow_tf32 else 'exact'}".replace("torch.", "")
    return f"{chip}/{kernel}/{dtypes}/{'x'.join(map(str, sizes))}/2^{tokens} tokens/2^{languages} languages"


def tuned(
    kernel: str, x: Tensor, weight_dtype: torch.dtype | None, sizes: Sequence[int], plan: Plan, allow_tf32: bool
) -> Config | None:
    """What was measured best for a launch, or None. Costs nothing while nothing has been measured."""
    found = _remembered()
    return found.get(problem(kernel, x, weight_dtype, sizes, plan, allow_tf32)) if found else None


def remember(name: str, config: Config) -> None:
    """Keep a config for a problem, on disk and for this process."""
    path = cache_file()
    _remembered.cache_clear()  # another process may have written since
    found = {**_remembered(), name: config}
    rows = {key: [dict(c.blocks), c.num_warps, c.num_stages] for key, c in sorted(found.items())}
    target = Path(os.path.realpath(path))  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "sha256": _checksum(rows), "configs": rows}
    # Written aside and renamed: another process never reads half a file.
    file = tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8")  # noqa: SIM115
    try:
        with file:
            json.dump(content, file, indent=1)
        os.replace(file.name, target)
    finally:
        Path(file.name).unlink(missing_ok=True)
    _remembered.cache_clear()
    forget()


def _checksum(rows: object) -> str:
    """A config with one digit changed may still be one, but a slow one, or one that no kernel takes."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


@cache
def _remembered() -> dict[str, Config]:
    """What the file holds; nothing if there is none or it cannot be read, as with any cache."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT or stored["sha256"] != _checksum(stored["configs"]):
            return {}
        return {
            key: Config(tuple(blocks.items()), warps, stages)
            for key, (blocks, warps, stages) in stored["configs"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
