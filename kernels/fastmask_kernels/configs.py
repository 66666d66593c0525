"""Which block sizes a kernel is launched with: a short, explicit list, chosen by chip, element size and shape.

Never by what is in a mask: dynamic subnetworks change masks every few steps, and a launch must not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: `blocks` are its constexpr block sizes by name."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]
