"""Which block sizes a kernel is launched with: a short, explicit list, chosen by chip, element size and shape.

Never by what is in a mask: dynamic subnetworks change masks every few steps, and a launch must not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Case", "Config"]


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: `blocks` are its constexpr block sizes by name."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]


@dataclass(frozen=True)
class Case:
    """One kernel as it is shipped, in the form the compiler takes without a GPU.

    `signature` maps each argument that is not constexpr to its type ("*bf16", "i32", ...), `constexprs` the others to
    their value; `aligned` names the arguments (pointers and sizes) that are multiples of 16 where it matters.
    `flops` and `bytes` are those of one step of the inner loop (one program): multiply-adds times two, and what the
    step reads from outside the multiprocessor.
    """

    kernel: Any  # a triton JITFunction
    name: str
    config: Config
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    flops: int
    bytes: int
    tensor_cores: bool = True
    targets: tuple[str, ...] = field(default=("sm_80", "sm_90", "sm_100", "gfx942"))
