"""BERT-base encoder layers, forward and backward: attached subnetworks against dense and every other way to mask."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.checking import check_all, check_baseline
from benchmarks.gpu.report import Row, row_of
from benchmarks.gpu.setup import Measurement, Setup, has_grouped
from benchmarks.gpu.timing import captured
from benchmarks.measure import Side, compare, on_gpu
from benchmarks.memory import cache_bytes, peak_bytes
from benchmarks.product import mixed_ids
from benchmarks.variants import Variants, encoder_of
from fastmask import operators

__all__ = ["Encoders", "bert", "compiled", "encoder"]

DENSITY = 0.5
COMPILE_SECONDS = 45
GOALS = {"dense": 1.4, "packed": 1.0, "loop": 2.0, "gating": 1.0}


class Encoders:
    """The same encoder as often as there are ways to mask it; all copies start with the same parameters."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.device = setup, setup.device
        sizes = (setup.hidden, setup.encoder_layers, setup.heads, setup.ffn, setup.encoder_tokens)
        plain = encoder_of(*sizes, self.device, setup.dtype)
        names = [f"language {i}" for i in range(setup.languages)]
        self.ids = mixed_ids(setup.encoder_examples, setup.languages).to(self.device)
        subnets = fm.Subnetworks.random(plain.config, names, DENSITY, seed=0, units="both")
        self.variants = Variants(plain, subnets, self.ids, share=False)
        self.masked = self.variants.masked
        shape = (setup.encoder_examples, setup.encoder_tokens, setup.hidden)
        size = shape[0] * shape[1] * shape[2] * torch.finfo(setup.dtype).bits // 8
        # Several inputs, so that none is found in the cache.
        copies = 1 + 2 * cache_bytes(self.device) // size if on_gpu(self.device) else 1
        self.inputs = [torch.randn(shape, device=self.device, dtype=setup.dtype) for _ in range(copies)]
        self.upstream = torch.randn(shape, device=self.device, dtype=setup.dtype)
        self._truth: list[Tensor] = []

    def variant(self, baseline: str) -> nn.Module:
        """A copy of the plain model that computes the masks by a baseline."""
        return self.variants.of(baseline)

    def step(self, model: nn.Module, x: Tensor) -> Tensor:
        """Forward and backward pass; returns the output."""
        arguments: dict[str, Any] = {"language_ids": self.ids} if model is self.masked else {}
        y: Tensor = model(inputs_embeds=x, **arguments)[0]
        y.backward(self.upstream.to(y.dtype))
        return y

    def side(self, model: nn.Module) -> Side:
        """As a program calls it, with one input after the other."""
        inputs = itertools.cycle(self.inputs)
        return Side(lambda: self.step(model, next(inputs)), model.zero_grad)

    def graph(self, model: nn.Module) -> Side:
        """As a CUDA graph: the device's time alone."""
        return captured(lambda: self.step(model, self.inputs[0]), model.zero_grad)

    def results(self, model: nn.Module) -> list[Tensor]:
        """Output and gradients of one step, by the parameters' order."""
        model.zero_grad()
        y = self.step(model, self.inputs[0].to(next(model.parameters()).dtype)).detach()
        # What a key's bias adds to the scores of a query is the same for every key: its true gradient is 0.
        grads = [p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith("key.bias")]
        model.zero_grad()
        return [y, torch.cat([grad.flatten() for grad in grads])]

    def check(self) -> list[Tensor]:
        """See that ours is right, once; returns the float64 results.

        Raises:
            RuntimeError: it is not.
        """
        if not self._truth:
            truth, plain = self.results(self.variant("gating").double()), self.results(self.variant("gating"))
            check_all("encoder", ("output", "gradients"), self.results(self.masked), truth, plain)
            self._truth = truth
        return self._truth

    def compared(self, name: str, model: nn.Module) -> list[Row]:
        """Rows against one other model: as called, and as graphs where there is a GPU."""
        truth, base = self.check(), name.removeprefix("compiled ")
        if base != "dense":
            check_baseline(name, self.results(model), truth)
        fields: dict[str, Any] = {
            "goal": GOALS.get(base),
            "ideal": 1 / DENSITY if base in ("dense", "gating") else None,
        }
        what = f"BERT encoder {DENSITY:.0%}, {self.setup.languages} languages, vs {name}"
        sides = [("as called", self.side)] + ([("graphs", self.graph)] if on_gpu(self.device) else [])
        rows = []
        for how, make in sides:
            try:
                ratio = compare(make(model), make(self.masked), self.device, self.setup.seconds)
            except Exception as error:
                torch.cuda.empty_cache()
                if how == "as called":
                    raise
                rows.append(Row(f"{what}, {how}", error=f"{type(error).__name__}: {error}"))
                continue
            layers = self.setup.encoder_layers
            note = f"{layers} layers" if layers > 1 else ""
            rows.append(row_of(f"{what}, {how}", ratio, name, note=note, **fields))
        model.zero_grad()
        self.masked.zero_grad()
        return rows


def bert(setup: Setup) -> list[Measurement]:
    """Whole encoder layers, heads and neurons at 50%, against dense and against the vendor's grouped product."""
    encoders = _once(setup)
    names = ("dense", "packed") if has_grouped(setup) else ("dense",)
    return [Measurement(f"encoder against {name}", _against(encoders, name)) for name in names]


def encoder(setup: Setup) -> list[Measurement]:
    """The same against every other way to mask, and in memory."""
    encoders = _once(setup)

    def torch_path() -> list[Row]:
        made = encoders()
        made.check()
        ours, plain = made.side(made.masked), made.side(made.masked)
        ratio = compare(Side(_with_backend("torch", plain.run), plain.reset), ours, setup.device, setup.seconds)
        return [row_of("BERT encoder, vs own PyTorch path, as called", ratio, "torch path")]

    def memory() -> list[Row]:
        if not on_gpu(setup.device):
            return []
        made = encoders()
        made.check()
        models = {"dense": made.variant("dense"), "ours": made.masked, "loop": made.variant("loop")}
        found = {
            name: peak_bytes(lambda model=model: made.step(model, made.inputs[0]), model.zero_grad)  # type: ignore[misc]
            for name, model in models.items()
        }
        note = "MiB: " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in found.items())
        what = "BERT encoder: peak memory of a step over dense"
        return [Row(what, found["ours"] / found["dense"], at_least=False, note=note, more=found)]

    return [
        *(Measurement(f"encoder against {name}", _against(encoders, name)) for name in ("loop", "gating")),
        Measurement("encoder against its PyTorch path", torch_path),
        Measurement("encoder memory", memory),
    ]


def compiled(setup: Setup) -> list[Measurement]:
    """The same against baselines that `torch.compile` has compiled."""
    encoders = _once(setup)

    def against(name: str) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            what = f"BERT encoder, vs compiled {name}"
            model = encoders().variant(name)
            try:
                with _time_limit(COMPILE_SECONDS):
                    for layer in model.encoder.layer:
                        layer.compile(backend=setup.compiler)
                    encoders().side(model).run()
                    model.zero_grad()
            except Exception as error:
                return [Row(what, note=f"does not compile: {type(error).__name__}: {error}"[:200])]
            return encoders().compared(f"compiled {name}", model)

        return run

    return [Measurement(f"encoder against compiled {name}", against(name)) for name in ("gating", "loop")]


def _once(setup: Setup) -> Callable[[], Encoders]:
    """All measurements of a section share one set of models, made by the first."""
    made: list[Encoders] = []

    def encoders() -> Encoders:
        if not made:
            made.append(Encoders(setup))
        return made[0]

    return encoders


def _against(encoders: Callable[[], Encoders], name: str) -> Callable[[], list[Row]]:
    return lambda: encoders().compared(name, encoders().variant(name))


def _with_backend(name: str, run: Callable[[], object]) -> Callable[[], object]:
    def wrapped() -> object:
        before, operators.FORCED = operators.FORCED, name
        try:
            return run()
        finally:
            operators.FORCED = before

    return wrapped


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the main thread once `seconds` have passed."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
