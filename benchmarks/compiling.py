"""`torch.compile`, held to its promises: one graph, and none made again because other languages come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["BACKEND", "compiled", "require_compiler", "seen_to_compile_once"]

Function = TypeVar("Function", bound=Callable[..., Any])
BACKEND = "inductor"


def require_compiler(device: str) -> None:
    """See that there is what `torch.compile` needs.

    Raises:
        RuntimeError: no C++ compiler for code on the CPU.
    """
    import os

    named = os.environ.get("CXX")
    if device == "cpu" and not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])):
        raise RuntimeError("--compile needs a C++ compiler, and there is none (expected g++ or clang++ on the PATH)")


def compiled(function: Function) -> Function:
    """The function or module compiled as one graph, for the very shapes that come; a graph break is an error."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)  # type: ignore[return-value]


def seen_to_compile_once(run: Callable[[], object]) -> None:
    """Run something that was compiled before.

    Raises:
        RuntimeError: it would be compiled again.
    """
    with torch.compiler.set_stance("fail_on_recompile"):
        run()
