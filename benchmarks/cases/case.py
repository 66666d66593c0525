"""`Case`: what every case offers: sides that were proven equal, the FLOP-ideal, and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import why_not
from benchmarks.row import Job, Setting
from fastmask.errors import unknown

DENSE = ("dense", "full")  # the whole network, as PyTorch runs it and through fastmask: ratios are taken to both
RIVALS_ERROR = 0.05


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before it, untimed: clearing its own gradients, as training does."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None

    def once(self) -> None:
        """Reset, then run, untimed."""
        self.reset()
        self.run()


class Case:
    """One thing to measure at one setting, in several implementations; by default each is a model in training.

    `names` are the implementations to run; none: all that apply. Those of `DENSE` always run.
    """

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    implementations: ClassVar[tuple[str, ...]]
    results_are: ClassVar[tuple[str, ...]]  # names of what `results` returns
    defaults: ClassVar[dict[str, Any]] = {}  # what a sweep takes for fields of the setting that are not given
    can: ClassVar[tuple[str, ...]] = ()  # what else it can be asked for: "compiled", "bfloat16", "cuda"
    ours: ClassVar[tuple[str, ...]] = ("fastmask",)  # implementations that are held to the rule of the tests
    least: ClassVar[int] = 7  # rounds at least
    one_by_one: ClassVar[bool] = False  # whether languages run one after the other, so that every rival applies
    masks: dict[str, fm.Mask]  # of each masked weight
    chosen: list[str]  # the implementations that run here
    notes: list[str]  # what was left out, and why
    models: dict[str, nn.Module]  # of the chosen implementations

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        self.setting, self.tokens = setting, setting.batch * setting.tokens  # that one run goes through
        asked = (*DENSE, *names) if names else self.implementations
        reasons = {name: self.why_not(setting, name) for name in self.implementations if name in asked}
        self.chosen = [name for name, reason in reasons.items() if reason is None]
        self.notes = [f"without {name}: {reason}" for name, reason in reasons.items() if reason is not None]

    @classmethod
    def refuse(cls, job: Job) -> None:
        """See that the case can do what is asked of it, before anything is built: KeyError or ValueError if not."""
        setting, of_case = job.setting, f"of the case {cls.name!r}"
        hows = [part.partition(" ")[2] for part in job.parts]
        for what, given, known in (
            (f"unit {of_case}", [setting.unit], cls.units),
            (f"implementation {of_case}", job.names, cls.implementations),
            (f"part {of_case}", [part.partition(" ")[0] for part in job.parts], cls.parts),
            ("way to run a part", filter(None, hows), ("graph", "host-time")),
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
        return None if cls.one_by_one else why_not(name, setting)

    def as_timed(self, function: Callable[..., Tensor], eager: bool = False) -> Callable[..., Tensor]:
        """A function under the setting's autocast and, unless `eager`, compiled if the setting says so."""
        if self.setting.compiled and not eager:
            function = torch.compile(function, fullgraph=True, dynamic=False)

        def run(*inputs: Tensor | None) -> Tensor:
            half = self.setting.dtype == "bfloat16"  # autocast leaves float64 alone
            with torch.autocast(self.setting.device, torch.bfloat16) if half else nullcontext():
                return function(*inputs)

        return run

    def check(self) -> None:
        """Prove every implementation equal to its reference in float64, before anything is timed.

        Ours by the rule of the tests: at most twice as far from it as the reference itself is in the setting's dtype.
        Rivals may round where they like: 5%. RuntimeError if one is not.
        """
        references: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}
        for name in self.chosen:
            by = ("dense", "dense") if name in DENSE else self.references(name)
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

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """What one run computes, on the first inputs; with a dtype, a run of a fresh, eager form in it."""
        model = self.models[name] if dtype is None else copy.deepcopy(self.model(name)).to(dtype)
        model.zero_grad()
        output = self.passes(name, model, dtype)()
        found = [output.detach(), gradients(model)] if "output" in self.results_are else [gradients(model)]
        model.zero_grad()
        return found

    def sides(self, part: str) -> dict[str, Side]:
        """What is timed: the chosen implementations that have such a part."""
        return {name: Side(self.passes(name, model), model.zero_grad) for name, model in self.models.items()}

    def kept(self) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward pass; empty where that is not counted."""
        return {}

    def references(self, name: str) -> tuple[str, str]:
        """Forms in plain PyTorch of what an implementation must compute: for float64, and for the setting's dtype."""
        raise NotImplementedError

    def model(self, name: str) -> nn.Module:
        """The model as an implementation runs it."""
        raise NotImplementedError

    def passes(self, name: str, model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[], Any]:
        """What runs the model forward and backward, and leaves gradients in it; may return the output."""
        raise NotImplementedError

    def ideal(self, name: str) -> float:
        """Speed over dense if time followed the FLOPs that the masks leave to an implementation."""
        raise NotImplementedError


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector.

    What a key's bias adds to the scores of a query is the same for every key: its true gradient is 0, and left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("key.bias")]
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
