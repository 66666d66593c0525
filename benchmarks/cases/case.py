"""`Case`: what every case offers: sides that were proven equal, the FLOP-ideal, and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.measure import Side
from benchmarks.setting import SHAPES, Setting
from fastmask.errors import unknown

__all__ = ["Case", "WrongResultError"]


class WrongResultError(RuntimeError):
    """An implementation does not compute what it should: nothing is timed."""


class Case:
    """One thing to measure at one setting, in several implementations.

    Args:
        setting: what is measured.
        names: implementations to run; default all that apply. The baseline always runs.

    Attributes:
        name, units, shapes, parts: of the case; the first part is what tables show where one is shown.
        implementations: all there are, the baseline of the ratios first.
        defaults: what a sweep takes for fields of the setting that are not given.
        layered: whether the setting's number of layers counts.
        aside: implementations that do something else, and have no ideal.
        can: what else it can be asked for: "compiled", "bfloat16", "cuda".
        warm_up, least: untimed runs of each side, and rounds at least; None: what is usual.
        chosen: the implementations that run here, the baseline first.
        notes: what was left out, and why.
    """

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]]
    shapes: ClassVar[tuple[str, ...]] = tuple(SHAPES)
    parts: ClassVar[tuple[str, ...]]
    implementations: ClassVar[tuple[str, ...]]
    defaults: ClassVar[dict[str, Any]] = {}
    layered: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = ()
    can: ClassVar[tuple[str, ...]] = ()
    warm_up: ClassVar[int] = 2
    least: ClassVar[int | None] = None

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        self.setting = setting
        self.notes: list[str] = []
        baseline, *others = self.implementations
        for name in names or ():
            if name not in self.implementations:
                raise unknown(f"implementation of the case {self.name!r}", name, self.implementations)
        self.chosen = [baseline]
        for name in others:
            if names is not None and name not in names:
                continue
            reason = self.why_not(setting, name)
            if reason is None:
                self.chosen.append(name)
            else:
                self.notes.append(f"without {name}: {reason}")

    @property
    def baseline(self) -> str:
        """The implementation that ratios are taken to."""
        return self.implementations[0]

    @classmethod
    def refuse(cls, setting: Setting) -> None:
        """See that the case knows the setting's unit and shape, before anything is built.

        Raises:
            KeyError: it does not; the message names those it knows.
            DoesNotFitError: parts of the setting do not go together here.
        """
        for what, given, known in (("unit", setting.unit, cls.units), ("shape", setting.shape, cls.shapes)):
            if given not in known:
                raise unknown(f"{what} of the case {cls.name!r}", given, known)

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """Why an implementation does not apply at a setting; None if it does."""
        return None

    @classmethod
    def memory_needed(cls, setting: Setting, names: Sequence[str]) -> int:
        """Bytes that the measurement will take, roughly; 0 where that is no question."""
        return 0

    def check(self) -> None:
        """Prove every implementation equal to the reference.

        Raises:
            WrongResultError: one is not; nothing is timed.
        """
        raise NotImplementedError

    def sides(self, part: str) -> dict[str, Side]:
        """What is timed: the chosen implementations, the baseline first."""
        raise NotImplementedError

    def ideal(self) -> float:
        """The ratio if time followed the FLOPs that the masks leave."""
        raise NotImplementedError

    def ideal_of(self, name: str) -> float | None:
        """The ideal of one implementation: 1 of the dense ones, None of those that do something else."""
        if name in self.aside:
            return None
        return 1.0 if name in (self.baseline, "full") else self.ideal()

    def saved(self) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward pass; empty where that is not counted."""
        return {}

    def peaks(self) -> dict[str, int]:
        """Most bytes that each implementation holds at once beyond what is there before; empty where not counted."""
        return {}

    def mask_bytes(self) -> int | None:
        """Bytes of the masks of all languages; None where there are none."""
        return None

    def findings(self, times: dict[str, dict[str, list[float]]]) -> list[str]:
        """What else there is to say once everything was timed: milliseconds by part and implementation."""
        return []
