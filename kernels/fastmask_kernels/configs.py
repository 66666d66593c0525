"""Which block sizes a kernel is launched with: a short, explicit list, chosen by chip, element size and shape.

Never by what is in a mask: dynamic subnetworks change masks every few steps, and a launch must not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        blocks: its constexpr block sizes by name.
        resident: programs that a multiprocessor holds at a time, by the registers and shared memory that the compiler
            reports.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    resident: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]
