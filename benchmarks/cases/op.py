"""One masked weight: forward, dX and dW, apart and together, as an attached model runs it; and `MaskedLinear` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import BASELINES, Baseline, why_not
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.checking import check_baseline
from benchmarks.compiling import compiled, seen_to_compile_once
from benchmarks.measure import Side
from benchmarks.memory import cache_bytes, peak_bytes
from benchmarks.product import PARTS, Function, Product, units_of
from benchmarks.setting import BLOCKS, DoesNotFitError, Setting, block_of
from fastmask.operators import compute

__all__ = ["Layer", "Op"]

MOST_COPIES = 8


class Op(Case):
    """The operator on one projection; masks over rows and columns run packed.

    Heads are masked on a query projection [hidden, hidden] and, as "head-inputs", on an output projection; neurons,
    blocks and weights on the up projection [ffn, hidden], "neuron-inputs" on the down projection.
    """

    name = "op"
    units = ("heads", "neurons", "head-inputs", "neuron-inputs", *BLOCKS, "weights")
    parts = PARTS
    implementations = ("dense", "fastmask", "full", "multiply", "loop", "stack", "grouped", "gating", "bsr")
    defaults: ClassVar[dict[str, Any]] = {"unit": "neurons"}
    can = ("compiled", "bfloat16", "cuda")
    layered = False
    packed: ClassVar[bool] = True

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        mask, ids = mask_of(setting), setting.ids()
        size = 4 * setting.batch * setting.tokens * (mask.in_features + mask.out_features) + 4 * weights_of(setting)
        copies = min(MOST_COPIES, 1 + 2 * cache_bytes(setting.torch_device) // size)
        self.product = Product(
            mask, ids, setting.tokens, setting.torch_device,
            packed=self.packed, autocast=setting.autocast, copies=copies,
        )  # fmt: skip
        self._compiled: dict[str, Function] = {}

    @classmethod
    def refuse(cls, setting: Setting) -> None:
        """Blocks must divide the weight."""
        super().refuse(setting)
        N, K = weight_shape(setting)
        if setting.unit in BLOCKS and (N % block_of(setting.unit) or K % block_of(setting.unit)):
            raise DoesNotFitError(f"{setting.unit} do not divide a weight of {N} x {K} (shape {setting.shape})")

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """By the kind of the mask; block-sparse rows only run forward, and not compiled."""
        if name in ("dense", "fastmask", "full"):
            return None
        if name == "bsr" and (setting.compiled or setting.dtype != "float32"):
            return "block-sparse rows run as they are, in float32"
        half = setting.dtype == "bfloat16"
        return why_not(name, kind_of(setting.unit), setting.present, backward=False, half=half)

    @classmethod
    def memory_needed(cls, setting: Setting, names: Sequence[str]) -> int:
        """Operands, masks while they are made, and the copies of `stack`."""
        weight = 4 * weights_of(setting)
        flags = weight * 2 * setting.languages if setting.unit in ("weights", *BLOCKS) else 0
        copies = 3 * setting.present * weight if {"stack", "grouped"} & set(names) else 0
        sizes = setting.sizes
        return flags + copies + 6 * weight + 8 * 4 * setting.batch * setting.tokens * (sizes.hidden + sizes.ffn)

    def check(self) -> None:
        """Ours against float64 by the rule of the tests; every baseline against float64 within rounding."""
        self.product.check()
        for name in self.chosen:
            if name == "bsr":
                self._check_forward(name)
            elif name not in ("dense", "fastmask"):
                self.product.check_against(name, self._baseline(name))
        if self.setting.compiled:
            self._check_compiled()

    def sides(self, part: str) -> dict[str, Side]:
        """One for each implementation that has such a part."""
        names = [name for name in self.chosen if part == "forward" or name != "bsr"]
        return {name: self._side(part, name) for name in names}

    def _side(self, part: str, name: str) -> Side:
        baseline = None if name == "fastmask" else self._baseline(name)
        wrap: Callable[[Function], Function] | None = None
        if self.setting.compiled:
            wrap = lambda function: self._compiled.setdefault(name, compiled(function))  # noqa: E731
        return self.product.side(part, baseline, wrap)

    def _baseline(self, name: str) -> Baseline:
        return self.product.full if name == "full" else BASELINES[name]

    def ideal(self) -> float:
        """Dense FLOPs over live ones; 1 for single weights, whose product stays dense."""
        if self.setting.unit == "weights":
            return 1.0
        product = self.product
        every = 2.0 * self.setting.batch * self.setting.tokens * weights_of(self.setting)
        return every / product.flops

    def peaks(self) -> dict[str, int]:
        """Of a forward and backward pass."""
        names = [name for name in self.chosen if name != "bsr"]
        device = self.setting.torch_device
        return {name: peak_bytes(self._side(PARTS[-1], name).run, device=device) for name in names}

    def mask_bytes(self) -> int:
        """All languages' masks."""
        return self.product.mask.nbytes

    def _check_forward(self, name: str) -> None:
        product, operands = self.product, self.product.operands[0]
        with torch.no_grad():
            y = BASELINES[name](operands.x, operands.weight, product.task, operands.bias)
        check_baseline(name, [y], product.check()[:1])

    def _check_compiled(self) -> None:
        """No graph breaks, the same results, and no second compilation for other languages."""
        product, operands = self.product, self.product.operands[0]
        mask, width, ids = product.mask, product.width, product.ids

        def ours(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
            return compute(x, weight, mask, ids, bias, width)

        run = compiled(ours)

        def call(ids: Tensor) -> Tensor:
            with self.setting.autocast(), torch.no_grad():
                return run(operands.our_x, operands.weight, operands.bias, ids)

        with self.setting.autocast(), torch.no_grad():
            expected = product.ours(operands.our_x, operands.weight, operands.bias)
        if not (call(ids) - expected).norm() <= 1e-2 * expected.norm():
            raise WrongResultError("compiled fastmask is wrong: nothing is timed")
        other = (ids + 1) % mask.n_languages
        seen_to_compile_once(lambda: call(other))


class Layer(Op):
    """`MaskedLinear` as it is used alone: inputs and outputs at full width, through all checks of the public call."""

    name = "layer"
    packed = False

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        product = self.product
        product.ours = lambda x, weight, bias: fm.masked_linear(x, weight, product.mask, product.ids, bias)  # type: ignore[method-assign]


def kind_of(unit: str) -> str:
    """The kind of `fastmask.Mask` of a unit."""
    if unit in BLOCKS:
        return "blocks"
    return {"weights": "weights", "head-inputs": "columns", "neuron-inputs": "columns"}.get(unit, "rows")


def weight_shape(setting: Setting) -> tuple[int, int]:
    """[N, K] of the projection that carries a unit."""
    sizes = setting.sizes
    if setting.unit in ("heads", "head-inputs"):
        return sizes.hidden, sizes.hidden
    return (sizes.hidden, sizes.ffn) if setting.unit == "neuron-inputs" else (sizes.ffn, sizes.hidden)


def weights_of(setting: Setting) -> int:
    """N x K."""
    N, K = weight_shape(setting)
    return N * K


def mask_of(setting: Setting) -> fm.Mask:
    """Random masks of all languages."""
    N, K = weight_shape(setting)
    L, density, unit = setting.languages, setting.density, setting.unit
    if unit in BLOCKS:
        side = block_of(unit)
        keep = units_of(L, N // side * (K // side), 1, density).reshape(L, N // side, K // side)
        return fm.Mask.blocks(keep, (side, side))
    if unit == "weights":
        generator = torch.Generator().manual_seed(0)
        return fm.Mask.weights(torch.rand(L, N, K, generator=generator) < density)
    size = 1 if unit.startswith("neuron") else setting.sizes.hidden // setting.sizes.heads
    if kind_of(unit) == "rows":
        return fm.Mask.rows(units_of(L, N, size, density), K)
    return fm.Mask.columns(units_of(L, K, size, density), N)
