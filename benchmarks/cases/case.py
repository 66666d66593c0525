"""`Case`: what every case offers: sides that were proven equal, the FLOP-ideal, and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.errors import unknown

__all__ = ["DENSE", "Case"]

HOWS = ("graph", "host-time")

DENSE = ("dense", "full")  # the whole network, as PyTorch runs it and through fastmask: ratios are taken to both


class Case:
    """One thing to measure at one setting, in several implementations.

    Args:
        setting: what is measured.
        names: implementations to run; default all that apply. Those of `DENSE` always run.

    Attributes:
        name, units, parts, implementations: of the case.
        defaults: what a sweep takes for fields of the setting that are not given.
        can: what else it can be asked for: "compiled", "bfloat16", "cuda". A part may be followed by how it runs:
            " graph", replayed as a CUDA graph, is the device's time alone, " host-time" that until the call returns.
        least: rounds at least.
        chosen: the implementations that run here.
        notes: what was left out, and why.
    """

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    implementations: ClassVar[tuple[str, ...]]
    defaults: ClassVar[dict[str, Any]] = {}
    can: ClassVar[tuple[str, ...]] = ()
    least: ClassVar[int] = 7

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        self.setting = setting
        asked = self.implementations if names is None else (*DENSE, *names)
        reasons = {name: self.why_not(setting, name) for name in self.implementations if name in asked}
        self.chosen = [name for name, reason in reasons.items() if reason is None]
        self.notes = [f"without {name}: {reason}" for name, reason in reasons.items() if reason is not None]

    @classmethod
    def refuse(cls, setting: Setting, names: Sequence[str] = (), parts: Sequence[str] = ()) -> None:
        """See that the case knows what is asked of it, before anything is built.

        Raises:
            KeyError: a name that it does not know; the message gives those it does.
            ValueError: what it cannot do, or parts of the setting that do not go together here.
        """
        asked = (("unit", [setting.unit], cls.units), ("implementation", names, cls.implementations))
        names_of_parts = [part.partition(" ")[0] for part in parts]
        for what, given, known in (*asked, ("part", names_of_parts, cls.parts)):
            for name in given:
                if name not in known:
                    raise unknown(f"{what} of the case {cls.name!r}", name, known)
        for how in filter(None, (part.partition(" ")[2] for part in parts)):
            if how not in HOWS:
                raise unknown("way to run a part", how, HOWS)
            if how == "graph" and setting.device != "cuda":
                raise ValueError(f"a CUDA graph needs a GPU, and the device is {setting.device!r} (expected 'cuda')")
        for is_asked, what in (
            (setting.compiled, "compiled"),
            (setting.dtype != "float32", "bfloat16"),
            (setting.device != "cpu", "cuda"),
        ):
            if is_asked and what not in cls.can:
                raise ValueError(f"the case {cls.name!r} has no {what} form (expected one of: {', '.join(cls.can)})")

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """Why an implementation does not apply at a setting; None if it does."""
        return None

    @property
    def tokens(self) -> int:
        """Tokens that one run goes through."""
        return self.setting.batch * self.setting.tokens

    def check(self) -> None:
        """Prove every implementation equal to the reference in float64.

        Raises:
            RuntimeError: one is not; nothing is timed.
        """
        raise NotImplementedError

    def sides(self, part: str) -> dict[str, Side]:
        """What is timed: the chosen implementations that have such a part."""
        raise NotImplementedError

    def ideal(self, name: str) -> float:
        """Speed over dense if time followed the FLOPs that the masks leave to an implementation."""
        raise NotImplementedError

    def kept(self) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward pass; empty where that is not counted."""
        return {}

    def mask_bytes(self) -> int:
        """Bytes of the masks of all languages."""
        raise NotImplementedError
