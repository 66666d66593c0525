"""One masked layer, or several that share their input (Q, K and V), as an operator of autograd.

It takes lists; a single layer is a list of one. `masked_linear` and `sparse_update_linear` are both computed by it: for
the latter forward and dX are of the full network, and masks on dW and db alone. Eager calls go through a plain
`autograd.Function`. Tracers are shown a custom operator (`traced`), whose Python wrapping would cost an eager call more
than a small layer does. Which path computes it is decided here too: Triton kernels on a GPU, else plain PyTorch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask import triton_path
from fastmask.masks import Mask
from fastmask.torch_path import layers as torch_layers
from fastmask.torch_path.layers import NONE, Layers, Needs, Tensors

# The path, for tests: torch or triton, which without a GPU needs Triton's interpreter.
FORCED = os.environ.get("FASTMASK_BACKEND", "")

_PLAIN = frozenset((Tensor, nn.Parameter))


def run(layers: Layers, x: Tensor, weights: Tensors, biases: Tensors, language_ids: Tensor) -> Tensors:
    """`masked_linear` of layers over one input x [B, ..., K], without its checks: y of each, [B, ..., N or its width].

    For layers that were checked once. All weights have a bias, or none has: then `biases` is empty. What is written to
    the ids before the backward pass does not matter, unless the call was compiled.

    Raises:
        ValueError: an id on the CPU that is out of range, a language with more live units than the packed side holds.
    """
    x = autocast(x)
    if _is_traced(x, weights):
        from fastmask import traced  # which imports this module

        return traced.run(layers, x, weights, biases, language_ids)
    return _Eager.apply(layers, x, language_ids, *weights, *biases)


def packing_pays(masks: Sequence[Mask], x: Tensor, language_ids: Tensor) -> bool:
    """As `torch_path.layers.packing_pays`, for x [B, ..., K]; whatever else computes layers packs."""
    x = autocast(x)
    if _is_traced(x, ()) or path_for(x, ()) is not torch_layers:
        return True
    return torch_layers.packing_pays(masks, as_examples(x), language_ids)


def _is_traced(x: Tensor, weights: Tensors) -> bool:
    """Whether a tracer runs, which must be shown a custom operator; the tensors it passes are of types of its own."""
    return torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, (x, *weights)))


def autocast(x: Tensor) -> Tensor:
    """Cast x as autocast would; the weight is cast inside, after its dead part has been left out."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def as_examples(x: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]."""
    if x.ndim == 3:
        return x
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None]


# ---- eager: autograd.Function takes no lists, so the tensors come one after the other


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, x: Tensor, language_ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        G = len(layers.masks)
        weights, biases = tensors[:G], tensors[G:]
        kept: list[Tensor] | None = [] if ctx.needs_input_grad[1] else None
        path, examples = path_for(x, weights), as_examples(x)
        batch = path.prepare(layers, examples, language_ids)
        ys = path.forward(layers, batch, examples, weights, biases, kept)
        if x.ndim != 3:
            ys = [y.view(*x.shape[:-1], y.shape[2]) for y in ys]
        # The backward pass is of the same languages, whatever is written to the ids meanwhile.
        ctx.path, ctx.layers, ctx.batch, ctx.has_bias = path, layers, batch, bool(biases)
        # A frozen layer needs nothing of x but its shape: it is neither kept nor must it stay as it was.
        reads_x, ctx.shape = any(ctx.needs_input_grad[3 : 3 + G]) or layers.activation != NONE, x.shape
        ctx.save_for_backward(x if reads_x else x.new_empty(0), *weights, *(kept or ()))
        # Not as views of what was made inside: models write to outputs of their layers, which autograd refuses then.
        return tuple([y.data if y._is_view() else y for y in ys])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        # What `once_differentiable` does, but for the time that it takes where nobody asks.
        if torch.is_grad_enabled():
            return once_differentiable(_Eager._backward)(ctx, *dys)
        return _Eager._backward(ctx, *dys)

    @staticmethod
    def _backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        G = len(ctx.layers.masks)
        x, *tensors = ctx.saved_tensors
        needs_x, given = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        needs = Needs(needs_x, given[:G], given[G:] if ctx.has_bias else [False] * G)
        x = as_examples(x if x.shape == ctx.shape else x.new_empty(ctx.shape))
        upstreams = [as_examples(dy) for dy in dys]
        dx, dws, dbs = ctx.path.backward(ctx.layers, ctx.batch, upstreams, x, tensors[:G], needs, tensors[G:])
        return None, None if dx is None else dx.view(ctx.shape), None, *dws, *(dbs if ctx.has_bias else ())


# ---- the path


def path_for(x: Tensor, weights: Tensors) -> ModuleType:
    """`torch_path.layers` or `triton_path.layers`, for activations x and weights that are on one device.

    What the kernels cannot run goes to PyTorch, with one warning that says why.
    """
    if FORCED not in ("", "torch", "triton"):
        raise ValueError(f"FASTMASK_BACKEND must be 'torch' or 'triton', given {FORCED!r}")
    if FORCED == "torch" or (not FORCED and not _has_kernels(x.device)):
        return torch_layers
    reason = triton_path.why_not(x, weights)
    if reason is None:
        return _triton_layers()
    if FORCED == "triton":
        raise RuntimeError(f"FASTMASK_BACKEND=triton, but {reason}")
    _warn(reason)
    return torch_layers


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"  # NVIDIA, and AMD under ROCm


@cache
def _triton_layers() -> ModuleType:
    return importlib.import_module("fastmask.triton_path.layers")


@cache
def _warn(reason: str) -> None:
    """Warn once for each reason."""
    warnings.warn(f"fastmask runs masked layers in plain PyTorch: {reason}", stacklevel=2)
