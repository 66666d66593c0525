"""Running one batch: one masked layer, or several that share their input (Q, K and V; gate and up).

The live part of each weight is gathered and multiplied with a language's tokens: languages that are alike in their
numbers of tokens and units in one call, others one after the other. That takes as long for each language as the
products of 64 tokens. With fewer it is less work to multiply all tokens of the batch by the whole weight at once, dead
units and all, and to close gates on the activations of units that a language does not own (`is_cheaper`): every
language is the full network in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.kept import Kept
from fastmask.masks import FULL, UNPACKED, Mask
from fastmask.torch_path.gemm import HALF, Tensors, by_onednn, cast, products, speed
from fastmask.torch_path.split import Split, languages_of, split_of
from fastmask.torch_path.tiles import Tiles
from fastmask.torch_path.units import Units

__all__ = [
    "NONE", "Batch", "Grads", "Layers", "Needs", "Tensors", "activate", "activation_grad", "backward", "forward",
    "full_input_grad", "full_linear", "name_of", "prepare",
]  # fmt: skip

NONE = ""  # the name of no activation function


class Layers(NamedTuple):
    """What is not a tensor of autograd's in G layers over one input.

    Packed, the masked side is compact: live units at the front of the layer's width, zeros behind. A row mask makes
    y [B, ..., width]; a column mask takes x [B, ..., width], where anything finite may lie behind the live units (it
    meets zeros, if it is read at all). The width must hold the widest language of the batch. So heads and neurons
    travel from the projection that makes them to the one that consumes them.

    Attributes:
        masks: of each layer, all of one kind and of the same languages.
        widths: of the packed side of each, or -1 (`UNPACKED`).
        activation: a name of `activate`, applied to the input first, and computed again in the backward pass instead
            of being kept.
        full_forward: whether all examples go through the whole weights, and masks only say what may learn. Nothing is
            packed then.
    """

    masks: Sequence[Mask]
    widths: Sequence[int]
    activation: str = NONE
    full_forward: bool = False


class Needs(NamedTuple):
    """Which gradients are needed: of the input, and of each layer's weight and bias."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


Table = Units | Tiles  # one mask, and what its layers compute for each language
Grads = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]  # dx, and of each layer dW and db


class Batch(NamedTuple):
    """What the passes of layers know of a batch: tables of each mask, where the examples of each language are.

    gated: the tables once more, if the batch is to be run with gates.
    packs: whether that is slower than with packed units, with all that comes between projections (`packing_pays`).
    """

    tables: Sequence[Table]
    split: Split
    gated: Sequence[Units]
    packs: bool


def prepare(layers: Layers, x: Tensor, language_ids: Tensor) -> Batch:
    """The batch of x [B, T, K_in], for `forward` and `backward`; it holds no tensor of autograd's, nor the ids.

    Raises:
        ValueError: an id out of range.
    """
    tables = [
        _tables.of(mask.index, functools.partial(_made, mask, width != UNPACKED), width != UNPACKED)
        for mask, width in zip(layers.masks, layers.widths, strict=True)
    ]
    split = split_of(languages_of(language_ids, layers.masks[0].n_languages))
    plans, key = tables[0].plans, (split, x.shape[1], x.dtype, layers.full_forward, *tables[1:])
    planned = plans.get(key)
    if planned is None:
        planned = plans[key] = _planned(tables, split, x, layers.full_forward)
        # A mask may outlive batches and numbers of tokens, of which there can be any number.
        for oldest in list(plans)[:-MOST_PLANS]:
            plans.pop(oldest, None)
    split, is_gated, packs = planned
    return Batch(tables, split, tables if is_gated else (), packs)  # type: ignore[arg-type]  # only units are gated


def forward(
    layers: Layers, batch: Batch, x: Tensor, weights: Tensors, biases: Tensors, kept: list[Tensor] | None = None
) -> list[Tensor]:
    """Run x [B, T, K_in], activated, through each masked weight -> y of each, [B, T, its N_out].

    The weights as the products read them are put into `kept`, if it is a list: `backward` need not make them again.
    `biases` are those of all layers, or none.

    Raises:
        ValueError: a language with more live units than the packed side holds.
    """
    tables, split, gated, _ = batch
    for width, table in zip(layers.widths, tables, strict=True):
        _check_packed(width, table, split)
    x = activate(x, layers.activation)
    read = _read(layers, tables, weights, x, split.full if gated else split)
    if kept is not None:
        kept += read
    given: Sequence[Tensor | None] = biases or [None] * len(read)
    if layers.full_forward:
        return [full_linear(x, w, bias) for w, bias in zip(read, given, strict=True)]
    of_rows = layers.masks[0].kind == "rows"
    if gated and not of_rows:
        x = gated[0].enter(x, split)
    inside, T, ys = split.full if gated else split, x.shape[1], []
    tokens = inside.sorted(x)
    pieces = inside.pieces(tokens, T)
    for packed, table, w, bias, weight in zip(layers.widths, tables, read, given, weights, strict=True):
        N = weight.shape[0]
        width = packed if of_rows and packed != UNPACKED else N
        if inside.present == (FULL,) and isinstance(table, Units):
            y = full_linear(x, w if of_rows else w.t(), bias)
            ys.append(table.leave(y, split, width) if gated and of_rows else y)
            continue
        flat = tokens.new_empty(tokens.shape[0], width)
        table.forward(inside.present, pieces, w, inside.pieces(flat, T))
        y = inside.unsorted(flat, T)
        if bias is not None:
            table.add_bias(y, bias, inside)
        ys.append(y)
    return ys


def backward(
    layers: Layers, batch: Batch, dys: Tensors, x: Tensor, weights: Tensors, needs: Needs, kept: Tensors = ()
) -> Grads:
    """Gradients of `forward`: (dx, dW of each, db of each), each None unless it is needed.

    `kept` is what the forward pass left there. Half-precision weights are summed in float32 when several languages add
    to them. With `full_forward` only dW and db are of the languages, and zero at what they do not own.
    """
    tables, split, gated, _ = batch
    active, inside = activate(x, layers.activation), split.full if gated else split
    read = kept or (_read(layers, tables, weights, x, inside) if needs.x else ())
    if gated and gated[0].of_rows:
        upstreams = [table.enter(dy, split) for dy, table in zip(dys, gated, strict=True)]
    else:
        upstreams = list(dys)
        active = gated[0].enter(active, split) if gated else active
    T, tokens = x.shape[1], inside.sorted(active)
    flat = torch.empty_like(tokens) if needs.x and not layers.full_forward else None
    pieces, of_dx = inside.pieces(tokens, T), None if flat is None else inside.pieces(flat, T)
    dws: list[Tensor | None] = [None] * len(tables)
    dbs: list[Tensor | None] = [None] * len(tables)
    for g, (table, dy, weight) in enumerate(zip(tables, upstreams, weights, strict=True)):
        # What the languages of a batch add up in.
        dtype = torch.float32 if weight.dtype in HALF and len(inside.parts) > 1 else weight.dtype
        of_dy = inside.pieces(inside.sorted(dy), T)
        if of_dx is not None:
            table.input_grad(inside.present, of_dy, read[g], of_dx, add=g > 0)
        if needs.weights[g]:
            dw = table.weight_grad(inside.present, of_dy, pieces, weight, dtype)
            dws[g] = cast(dw if inside.parts else dw.zero_(), weight.dtype)
        if needs.biases[g]:
            db = table.bias_grad(dy, inside, torch.float32 if weight.dtype in HALF else weight.dtype)
            dbs[g] = cast(db, weight.dtype)
    dx = None if flat is None else inside.unsorted(flat, T)
    if dx is not None and gated and not gated[0].of_rows:
        dx = gated[0].leave(dx, split, x.shape[2])
    if needs.x and layers.full_forward:
        dx = full_input_grad(dys, read)
    return None if dx is None else activation_grad(dx, x, layers.activation), dws, dbs


def _read(layers: Layers, tables: Sequence[Table], weights: Tensors, x: Tensor, split: Split) -> list[Tensor]:
    """The weights as the products of a batch read them."""
    if layers.full_forward:
        return [cast(weight, x.dtype) for weight in weights]
    return [table.read(weight, x.dtype, len(split.parts)) for table, weight in zip(tables, weights, strict=True)]


# ---- what is made once: tables of each mask, and plans of its batches

_tables: Kept[Table] = Kept()
MOST_PLANS = 64  # of a mask


def _made(mask: Mask, packed: bool) -> Table:
    return Units(mask, packed) if mask.kind in ("rows", "columns") else Tiles(mask)


def _planned(tables: Sequence[Table], split: Split, x: Tensor, full_forward: bool) -> tuple[Split, bool, bool]:
    """The split by masks that differ, whether to run the batch with gates, and whether it had better be packed."""
    split = split.merged([table.same_as for table in tables])
    units = [table for table in tables if isinstance(table, Units)]
    can = len(units) == len(tables) and (units[0].of_rows or len(units) == 1)
    masked = can and any(not table.whole(language) for table in units for language in split.present)
    gated = masked and is_cheaper(units, x, split, full_forward)
    return split, gated, not (gated and is_cheaper(units, x, split, full_forward, True))


# What the two ways cost, in multiply-adds of float32; fitted to times of projections of width 384 and 768, 3 to 16
# languages, 16 to 144 tokens of each and densities of 0.3 to 0.9 on one core.
GATHERED = 64  # what gathering a live weight and adding its gradient cost, in tokens that it is multiplied by
CALLS = 2**21  # what the calls for one language cost
READ = 64  # what reading the whole weight and writing its gradient cost, in tokens
GATE, GATE_OF_PACKED = 16, 192  # what a gate on an activation costs
ATTENTION, ELEMENTWISE = 256, 16  # what the model does with a number of a head, and of a neuron, between projections


def packing_pays(masks: Sequence[Mask], x: Tensor, language_ids: Tensor) -> bool:
    """Whether layers over rows, and what comes between them and the layer that consumes their units, run faster packed.

    If not, all are best multiplied whole, as if every language were the full network, and units stay in their slots.
    """
    return prepare(Layers(masks, [UNPACKED] * len(masks)), x, language_ids).packs


def is_cheaper(
    tables: Sequence[Units], x: Tensor, split: Split, full_forward: bool = False, with_between: bool = False
) -> bool:
    """Whether layers that share an input x [B, T, K] are run faster whole, with gates.

    With `full_forward` that is asked of weight gradients alone; the whole weight is read in any case. `with_between`
    counts what the model computes of their outputs, which dead units are spared if they travel packed.
    """
    looped = gated = 0.0
    tokens = len(split.languages) * x.shape[1]
    parts = [(language, (last - first) * x.shape[1]) for language, first, last in split.parts]
    # What is multiplied: in half precision many times as fast, most of all for many tokens.
    together, apart = tokens / speed(x, tokens), {language: own / speed(x, own) for language, own in parts}
    for table in tables:
        work = sum(table.live[language] * (apart[language] + GATHERED) for language, _ in parts)
        looped += work * table.other + len(parts) * CALLS
        gate = tokens * (GATE_OF_PACKED if table.packed else GATE)
        gated += table.size * ((together + (0 if full_forward else READ)) * table.other + gate)
        if with_between:
            between = ATTENTION if table.unit > 1 else ELEMENTWISE
            looped += between * sum(table.live[language] * own for language, own in parts)
            gated += between * table.size * tokens
    return gated < looped


def _check_packed(width: int, table: Table, split: Split) -> None:
    if width == UNPACKED or not isinstance(table, Units):
        return
    for language in split.present:
        if table.live[language] > width:
            name = "the full network (-1)" if language == FULL else f"language {language}"
            live = f"{table.live[language]} live {'rows' if table.of_rows else 'columns'}"
            raise ValueError(f"{name} has {live}, more than the packed width {width}")


# ---- the full network, whatever the languages: forward and dX of layers whose masks only say what may learn


def full_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The output [B, T, N] of a weight [N, K] in the dtype of x [B, T, K]."""
    bias = None if bias is None else cast(bias, x.dtype)
    if not by_onednn(x):
        return F.linear(x, w, bias)
    y = x.new_empty(*x.shape[:2], w.shape[0])
    products([x.flatten(0, 1)], w, None, [y.flatten(0, 1)], transposed=True)
    return y if bias is None else y.add_(bias)


def full_input_grad(dys: Tensors, weights: Tensors) -> Tensor:
    """The dX [B, T, K] of the dY [B, T, N] of each weight."""
    B, T, _ = dys[0].shape
    dx = dys[0].new_empty(B * T, weights[0].shape[1])
    for number, (dy, w) in enumerate(zip(dys, weights, strict=True)):
        products([dy.reshape(B * T, dy.shape[2])], w, None, [dx], add=number > 0)
    return dx.view(B, T, dx.shape[1])


# ---- activation functions that a packed projection applies to its input itself: a plain FFN keeps the activation's
# input and its output for the backward pass, this one the input only, for a fraction of a percent of its time


def name_of(module: nn.Module) -> str:
    """The name under which `activate` computes what `module` computes; `NONE` if it does not know it."""
    if type(module) is nn.ReLU:  # and no subclass, which may compute anything
        return "relu"
    exact = type(module) is nn.GELU and module.approximate == "none"
    # That of transformers holds the function it calls.
    return "gelu" if exact or (type(module).__name__ == "GELUActivation" and module.act is F.gelu) else NONE


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation function, element by element; each maps 0 to 0, so that zero-filled slots stay zero."""
    if name == "gelu":
        return F.gelu(x)
    return F.relu(x) if name == "relu" else x


def activation_grad(dy: Tensor, x: Tensor, name: str) -> Tensor:
    """The gradient of `activate` at x for an upstream gradient."""
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    return torch.ops.aten.threshold_backward(dy, x, 0) if name == "relu" else dy
