"""What a number was measured on: processor with its model, versions, commit, date."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

import fastmask
from fastmask.processor import processor
from fastmask.torch_path.gemm import by_onednn

__all__ = ["ROOT", "Machine", "commit_of", "this_machine"]

ROOT = Path(__file__).resolve().parents[1]


def commit_of(root: Path) -> str | None:
    """The commit of the checkout, with a plus if files differ from it; None where git does not say."""
    try:
        ask = ["git", "-C", str(root)]
        head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


@dataclass(frozen=True)
class Machine:
    """Where a number comes from; empty text for what is not known.

    `products` is what fastmask multiplied float32 matrices with on a CPU: "torch", or "onednn" where that is faster; on
    a GPU Triton's version.
    """

    processor: str
    torch: str
    python: str
    fastmask: str
    products: str
    commit: str
    date: str


def this_machine(device: torch.device) -> Machine:
    """What runs here, on a device."""
    commit = commit_of(ROOT) or ""
    if device.type == "cpu":
        name, products = processor(), "onednn" if by_onednn(torch.zeros(1)) else "torch"
    else:
        import triton

        name, products = torch.cuda.get_device_name(device), f"triton {triton.__version__}"
    versions = (torch.__version__, platform.python_version(), fastmask.__version__)
    return Machine(name, *versions, products, commit[:12] + commit[40:], date.today().isoformat())
