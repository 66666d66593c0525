"""`Case`: what every case offers: sides that were proven equal, the FLOP-ideal, and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.errors import unknown

__all__ = ["DENSE", "Case"]

HOWS = ("graph", "host-time")
DENSE = ("dense", "full")  # the whole network, as PyTorch runs it and through fastmask: ratios are taken to both
RIVALS_ERROR = 0.05


class Case:
    """One thing to measure at one setting, in several implementations.

    Args:
        setting: what is measured.
        names: implementations to run; none: all that apply. Those of `DENSE` always run.

    Attributes:
        name, units, parts, implementations: of the case.
        results_are: names of what `results` returns.
        defaults: what a sweep takes for fields of the setting that are not given.
        can: what else it can be asked for: "compiled", "bfloat16", "cuda". A part may be followed by how it runs:
            " graph", replayed as a CUDA graph, is the device's time alone, " host-time" that until the call returns.
        ours: implementations that are held to the rule of the tests.
        least: rounds at least.
        masks: of each masked weight.
        chosen: the implementations that run here.
        notes: what was left out, and why.
    """

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    implementations: ClassVar[tuple[str, ...]]
    results_are: ClassVar[tuple[str, ...]]
    defaults: ClassVar[dict[str, Any]] = {}
    can: ClassVar[tuple[str, ...]] = ()
    ours: ClassVar[tuple[str, ...]] = ("fastmask",)
    least: ClassVar[int] = 7
    masks: dict[str, fm.Mask]

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        self.setting = setting
        asked = (*DENSE, *names) if names else self.implementations
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
        what_parts, hows = [part.partition(" ")[0] for part in parts], [part.partition(" ")[2] for part in parts]
        for what, given, known in (
            (f"unit of the case {cls.name!r}", [setting.unit], cls.units),
            (f"implementation of the case {cls.name!r}", names, cls.implementations),
            (f"part of the case {cls.name!r}", what_parts, cls.parts),
            ("way to run a part", filter(None, hows), HOWS),
        ):
            for name in given:
                if name not in known:
                    raise unknown(what, name, known)
        asked = {"compiled": setting.compiled, "bfloat16": setting.dtype != "float32", "cuda": setting.device == "cuda"}
        for what in (what for what, is_asked in asked.items() if is_asked and what not in cls.can):
            raise ValueError(f"the case {cls.name!r} has no {what} form (expected one of: {', '.join(cls.can)})")
        if "graph" in hows and setting.device != "cuda":
            raise ValueError(f"a CUDA graph needs a GPU, and the device is {setting.device!r} (expected 'cuda')")
        if setting.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no GPU here (expected cpu)")

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """Why an implementation does not apply at a setting; None if it does."""
        return None

    @property
    def tokens(self) -> int:
        """Tokens that one run goes through."""
        return self.setting.batch * self.setting.tokens

    # ---- proof

    def check(self) -> None:
        """Prove every implementation equal to its reference in float64, before anything is timed.

        Ours by the rule of the tests: at most twice as far from it as the reference itself is in the setting's dtype.
        Rivals may round where they like: 5%.

        Raises:
            RuntimeError: one is not.
        """
        references: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}
        for name in self.chosen:
            by = self.references(name)
            if by not in references:
                references[by] = (self.results(by[0], torch.float64), self.results(by[1], self.setting.parameters))
            found = self.results(name)  # of some rivals the first one only
            for what, ours, truth, plain in zip(self.results_are, found, *references[by], strict=False):
                half_rounding = torch.finfo(plain.dtype).eps / 2 * truth.norm()
                allowed = 2 * torch.maximum((plain.double() - truth).norm(), half_rounding)
                alike = ours.shape == truth.shape and ours.dtype == plain.dtype
                if name not in self.ours:
                    allowed, alike = RIVALS_ERROR * truth.norm(), ours.shape == truth.shape
                error = (ours.double() - truth).norm() if alike else torch.inf
                if not error <= allowed:  # NaN is not
                    wrong = f"{what} of {name} is wrong: error {error:.3e}, allowed {allowed:.3e}"
                    raise RuntimeError(f"{self.setting.words()}: {wrong}: nothing is timed")

    def references(self, name: str) -> tuple[str, str]:
        """Forms in plain PyTorch of what an implementation must compute: for float64, and for the setting's dtype."""
        raise NotImplementedError

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """What one run computes, on the first inputs; with a dtype, a run of a fresh, eager form in it."""
        raise NotImplementedError

    # ---- what is measured

    def as_timed(self, function: Callable[..., Tensor], eager: bool = False) -> Callable[..., Tensor]:
        """A function under the setting's autocast and, unless `eager`, compiled if the setting says so."""
        if self.setting.compiled and not eager:
            function = torch.compile(function, fullgraph=True, dynamic=False)

        def run(*inputs: Tensor | None) -> Tensor:
            with self.setting.autocast():
                return function(*inputs)

        return run

    def sides(self, part: str) -> dict[str, Side]:
        """What is timed: the chosen implementations that have such a part."""
        raise NotImplementedError

    def ideal(self, name: str) -> float:
        """Speed over dense if time followed the FLOPs that the masks leave to an implementation."""
        raise NotImplementedError

    def kept(self) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward pass; empty where that is not counted."""
        return {}
