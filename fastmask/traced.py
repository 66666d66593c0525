"""What tracers are shown of a masked layer: custom operators, and what they are in plain operators of ATen.

`torch.compile` and `torch.export` see `fastmask::masked_linear` and its backward, which keep nothing but their inputs:
language ids must not be written to between the passes, and only what PyTorch writes is noticed.
An exported graph that has to run without fastmask is decomposed:

    program = torch.export.export(model, (), kwargs)              # kwargs with language_ids: a mixed batch
    program = program.run_decompositions(fastmask.decompositions())

It computes the full layer, and is as right and as slow as multiplying by masks: to deploy one language, export what
`fastmask.extract` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import bits
from fastmask.masks import FULL, UNPACKED, Mask
from fastmask.operators import as_examples, path_for
from fastmask.torch_path.layers import Layers, Needs, Tensors, activate
from fastmask.torch_path.packing import enter, leave, slots


class Settings(NamedTuple):
    """What is not a tensor of G layers over one input: the arguments of the operator behind its tensors.

    kind, n_languages: of all masks. geometries: two numbers for each, `Mask.geometry` (a unit's second number is 0).
    packed_widths, activation, full_forward: as in `torch_path.layers.Layers`.
    """

    kind: str
    geometries: list[int]
    n_languages: int
    packed_widths: Sequence[int]
    activation: str
    full_forward: bool = False


_MASKS = (
    "Tensor language_ids, Tensor[] indices, Tensor[] extents, str kind, SymInt[] geometries, SymInt n_languages, "
    "SymInt[] packed_widths, str activation, bool full_forward"
)
_FORWARD = f"(Tensor x, Tensor[] weights, Tensor[] biases, {_MASKS}) -> Tensor[]"
_BACKWARD = (
    f"(Tensor[] dys, Tensor x, Tensor[] weights, {_MASKS}, bool needs_x, bool[] needs_weight, bool[] needs_bias)"
    " -> (Tensor, Tensor[], Tensor[])"
)


def run(layers: Layers, x: Tensor, weights: Tensors, biases: Tensors, language_ids: Tensor) -> list[Tensor]:
    """As `operators.run`, for tracers."""
    masks = layers.masks
    geometries = [n for mask in masks for n in (*mask.geometry, 0)[:2]]
    settings = Settings(masks[0].kind, geometries, masks[0].n_languages, *layers[1:])
    indices, extents = [mask.index for mask in masks], [mask.extents for mask in masks]
    return torch.ops.fastmask.masked_linear(x, weights, biases, language_ids, indices, extents, *settings)


def _layers(weights: Tensors, indices: Tensors, extents: Tensors, settings: Settings) -> Layers:
    """The layers of an operator's arguments."""
    sizes = zip(settings.geometries[::2], settings.geometries[1::2], strict=True)
    masks = [
        Mask(settings.kind, (settings.n_languages, *w.shape), (size[0],) if size[1] == 0 else size, index, extent)
        for w, size, index, extent in zip(weights, sizes, indices, extents, strict=True)
    ]
    return Layers(masks, settings.packed_widths, settings.activation, settings.full_forward)


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    layers = _layers(weights, indices, extents, Settings(*settings))
    path, examples = path_for(x, weights), as_examples(x)
    ys = path.forward(layers, path.prepare(layers, examples, language_ids), examples, weights, biases)
    return [y.view(*x.shape[:-1], y.shape[2]) for y in ys]


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers, needs = _layers(weights, indices, extents, Settings(*rest[:-3])), Needs(*rest[-3:])
    upstreams = [as_examples(dy) for dy in dys]
    path, examples = path_for(x, weights), as_examples(x)
    batch = path.prepare(layers, examples, language_ids)
    dx, dws, dbs = path.backward(layers, batch, upstreams, examples, weights, needs)
    # An operator cannot return None: what was not asked for comes back empty. Nor may its outputs share memory.
    seen: set[int] = set()
    grads = []
    for w, grad in zip([*weights, *weights], [*dws, *dbs], strict=True):
        grad = w.new_empty(0) if grad is None else grad.contiguous()  # as the tracer was told
        memory = grad.untyped_storage()._cdata
        grads.append(grad.clone() if memory in seen else grad)
        seen.add(memory)
    return x.new_empty(0) if dx is None else dx.view(x.shape).contiguous(), grads[: len(dws)], grads[len(dws) :]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, language_ids, indices, extents, *ctx.settings = inputs
    ctx.has_bias = bool(biases)
    ctx.save_for_backward(x, language_ids, *weights, *indices, *extents)


def _gradients(ctx: Any, dys: list[Tensor]) -> tuple[Any, ...]:
    x, language_ids, *tensors = ctx.saved_tensors
    G = len(tensors) // 3
    weights, indices, extents = list(tensors[:G]), list(tensors[G : 2 * G]), list(tensors[2 * G :])
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_bias = needs_bias if ctx.has_bias else [False] * G
    dx, dws, dbs = torch.ops.fastmask.masked_linear_backward(
        dys, x, weights, language_ids, indices, extents, *ctx.settings, needs_x, needs_weight, needs_bias
    )
    grads = (dx if needs_x else None, _asked(dws, needs_weight), _asked(dbs, needs_bias) if ctx.has_bias else [])
    return *grads, None, [None] * G, [None] * G, *[None] * 6


def _asked(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


_forward_op = torch.library.custom_op("fastmask::masked_linear", _forward, mutates_args=(), schema=_FORWARD)
_backward_op = torch.library.custom_op("fastmask::masked_linear_backward", _backward, mutates_args=(), schema=_BACKWARD)
_forward_op.register_autograd(_gradients, setup_context=_setup_context)


@_forward_op.register_fake
def _(x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    settings = Settings(*rest[-len(Settings._fields) :])
    widths = [
        width if settings.kind == "rows" and width != UNPACKED else weight.shape[0]
        for weight, width in zip(weights, settings.packed_widths, strict=True)
    ]
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


@_backward_op.register_fake
def _(dys: list[Tensor], x: Tensor, weights: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    needs = Needs(*rest[-3:])
    return (
        x.new_empty(x.shape if needs.x else 0),
        [w.new_empty(w.shape if need else 0) for w, need in zip(weights, needs.weights, strict=True)],
        [w.new_empty(w.shape[0] if need else 0) for w, need in zip(weights, needs.biases, strict=True)],
    )


# ---- in plain operators


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for `ExportedProgram.run_decompositions`: PyTorch's own, and that of fastmask's operator."""
    return {**torch.export.default_decompositions(), torch.ops.fastmask.masked_linear.default: _masked_linear}


def _masked_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    kind, geometries, n_languages, packed_widths, activation, full_forward = Settings(*settings)
    x = activate(x, activation)
    found = []
    for g, weight in enumerate(weights):
        w, bias = weight.to(x.dtype), biases[g].to(x.dtype) if biases else None
        width = packed_widths[g]
        if full_forward:
            found.append(F.linear(x, w, bias))
        elif kind in ("rows", "columns"):
            size = weight.shape[0] if kind == "rows" else weight.shape[1]
            held = slots(indices[g], extents[g], size, width != UNPACKED)[_row(language_ids, n_languages)]
            if kind == "rows":
                found.append(leave(F.linear(x, w, bias), held, size if width == UNPACKED else width))
            else:
                found.append(F.linear(enter(x, held, size), w, bias))
        else:
            bn, bk = geometries[2 * g : 2 * g + 2]
            keep = bits.unpack_by_shifts(indices[g], weight.shape[1] // bk)
            keep = keep.repeat_interleave(bn, 1).repeat_interleave(bk, 2)
            y = F.linear(x, w)
            names = torch.arange(n_languages + 1, device=language_ids.device)
            at = names[_row(language_ids, n_languages)].view(-1, *[1] * (x.ndim - 1))
            for language in range(n_languages):
                y = torch.where(at == language, F.linear(x, w * keep[language]), y)
            found.append(y if bias is None else y + bias)
    return found


def _row(ids: Tensor, n_languages: int) -> Tensor:
    """Where a table of languages, with the full network behind them, has each id; out of range as the ids are."""
    known = torch.where(ids == FULL, n_languages, ids)
    return torch.where((ids < FULL) | (ids >= n_languages), n_languages + 1, known)
