"""What people would use instead: each rival in a few lines of plain PyTorch, on any device, differentiable.

All have one signature: `rival(x [B, ..., K], weight [N, K], task, bias [N] or None) -> y [B, ..., N]`. A `Task` holds
what a program can prepare once for a mask and a batch's language ids; no rival pays for that when it is timed. `dense`
ignores the masks; the others compute `fastmask.masked_linear`. `packed` does so as an attached model does: the masked
side is as wide as the widest language, live units in front.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.masks import Mask

__all__ = ["BASELINES", "EXPLAINED", "Baseline", "BaselineLinear", "Task", "units_of_mask", "why_not"]


class Task:
    """A mask and the languages of a batch, prepared: the languages present, their examples, and what each owns.

    Args:
        mask: masks of L languages, on the device that the rival will run on.
        language_ids: int64 [B], -1 (the full network) to L - 1.

    Attributes:
        languages: the G languages present, ascending.
        row_of: which of them each example has, int64 [B].
        bounds, ends: where each one's examples begin and end once sorted; the ends again as int32 [G].
        order, back: int64 [B]; examples sorted by language, and where each is after sorting. None if they are sorted.
        live: of row and column masks, the units each language owns, int64.
        units, padding: the same as a table [G, most], as wide as the widest of all languages; what is padding, or None.
        gates: of row and column masks, the units of each example, bool [B, N] or [B, K]; else None.
        keep: bool [G, N, K] for the languages present; of row and column masks a view.
        block: (bn, bk) of block masks, else None.
    """

    def __init__(self, mask: Mask, language_ids: Tensor) -> None:
        ids, device = language_ids.to(mask.device), mask.device
        self.kind, self.n_examples = mask.kind, len(ids)
        found, self.row_of, counts = ids.unique(return_inverse=True, return_counts=True)
        self.languages: list[int] = found.tolist()
        self.ends = counts.cumsum(0).to(torch.int32)
        self.bounds = list(pairwise([0, *self.ends.tolist()]))
        order = ids.argsort(stable=True)
        self.order, self.back = _unless_trivial(order), _unless_trivial(order.argsort())
        self.gates: Tensor | None = None
        if mask.kind in ("rows", "columns"):
            units = units_of_mask(mask)
            own = units[found + 1]
            self.live = [flags.nonzero().flatten() for flags in own]
            self.gates = units[ids + 1]
            wide = int(max(units[1:].sum(1).max(), own.sum(1).max())) if self.languages else 0
            padding = torch.arange(wide, device=device) >= own.sum(1, keepdim=True)
            self.padding = padding if bool(padding.any()) else None
            in_front = torch.sort(own.to(torch.int8), dim=1, descending=True, stable=True).indices
            self.units = in_front[:, :wide].masked_fill(padding, 0)
            shape = (len(found), mask.out_features, mask.in_features)
            self.keep = (own[:, :, None] if mask.kind == "rows" else own[:, None, :]).expand(shape)
        else:
            every = mask.to_dense()
            self.keep = torch.cat([torch.ones_like(every[:1]), every])[found + 1]
        self.block = tuple(mask.geometry) if mask.kind == "blocks" else None
        self._block_sparse: dict[int, list[Tensor]] = {}

    def block_sparse(self, weight: Tensor) -> list[Tensor]:
        """The masked weights of the languages present in PyTorch's block-sparse rows (BSR), made once for a weight.

        Raises:
            ValueError: not a mask over blocks.
        """
        if self.block is None:
            raise ValueError(f"block-sparse rows are for masks over blocks, not {self.kind}")
        if weight.data_ptr() not in self._block_sparse:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch calls them beta
                made = [(weight.detach() * keep).to_sparse_bsr(self.block) for keep in self.keep]
            self._block_sparse[weight.data_ptr()] = made
        return self._block_sparse[weight.data_ptr()]


def units_of_mask(mask: Mask) -> Tensor:
    """Bool [1 + L, N or K]: of a mask over rows or columns, the units of the full network, then of each language."""
    size = mask.out_features if mask.kind == "rows" else mask.in_features
    units = torch.zeros(1 + mask.n_languages, size, dtype=torch.bool, device=mask.device)
    units[0] = True
    for language, count in enumerate(mask.live_counts()):
        units[1 + language, mask.index[language, :count]] = True
    return units


def _unless_trivial(examples: Tensor) -> Tensor | None:
    """None for examples that are in order already: a program that sorts its batches moves nothing."""
    return None if torch.equal(examples, torch.arange(len(examples), device=examples.device)) else examples


# ---- the rivals

Baseline = Callable[[Tensor, Tensor, Task, Tensor | None], Tensor]


def dense(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: no masks at all."""
    return F.linear(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, W * M_l)`: one language for the whole batch."""
    if len(task.languages) != 1:
        raise ValueError(f"one mask for a whole batch: given the languages {task.languages}")
    gated = bias * task.keep[0, :, 0] if bias is not None and task.kind == "rows" else bias
    return F.linear(x, weight * task.keep[0], gated)


def loop(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """Gather each language's examples, multiply with its live (or masked) weight, put the results back."""
    ordered, parts = _taken(x, task.order), []
    for g, (first, last) in enumerate(task.bounds):
        part = ordered[first:last]
        if task.kind == "rows":
            live = task.live[g]
            y = F.linear(part, weight.index_select(0, live), None if bias is None else bias.index_select(0, live))
            y = y.new_zeros(*y.shape[:-1], weight.shape[0]).index_copy(-1, live, y)
        elif task.kind == "columns":
            live = task.live[g]
            y = F.linear(part.index_select(-1, live), weight.index_select(1, live), bias)
        else:
            y = F.linear(part, weight * task.keep[g], bias)
        parts.append(y)
    return _taken(torch.cat(parts), task.back)


def gating(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """Y = r o (W (c o x)): exact for masks over rows and columns, at dense cost."""
    if task.gates is None:
        raise ValueError(f"gates are for masks over rows or columns, not {task.kind}")
    gates = task.gates.reshape(task.n_examples, *[1] * (x.ndim - 2), -1)
    return F.linear(x, weight, bias) * gates if task.kind == "rows" else F.linear(x * gates, weight, bias)


def packed(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`grouped_mm` over copies of each language's live rows (columns): ragged and compact, by the vendor's kernels.

    A row mask makes [B, ..., most], a column mask takes it; what is behind the live units of x must be zero.
    """
    if task.gates is None:
        raise ValueError(f"live rows are those of masks over rows or columns, not {task.kind}")
    if torch.is_autocast_enabled(x.device.type):  # which `grouped_mm` knows nothing of
        x, weight = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight))
    rows = weight if task.kind == "rows" else weight.t().contiguous()
    copies = rows.index_select(0, task.units.flatten()).unflatten(0, task.units.shape)  # [G, most, K or N]
    if task.padding is not None:
        copies = copies.masked_fill(task.padding[..., None], 0)
    if task.kind == "rows":
        copies = copies.transpose(1, 2)
    ordered, ends = _taken(x, task.order), task.ends * x[0, ..., 0].numel()
    y = F.grouped_mm(ordered.reshape(-1, x.shape[-1]), copies, offs=ends)
    y = _taken(y.reshape(*ordered.shape[:-1], copies.shape[2]), task.back)
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    if task.kind == "columns":
        return y + bias
    own = bias[task.units] if task.padding is None else bias[task.units].masked_fill(task.padding, 0)
    return y + own[task.row_of].reshape(task.n_examples, *[1] * (y.ndim - 2), -1)


def bsr(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`loop` over weights kept as PyTorch's block-sparse rows: forward only, masks over blocks."""
    ordered, weights = _taken(x, task.order), task.block_sparse(weight)
    parts = [F.linear(ordered[first:last], own, bias) for own, (first, last) in zip(weights, task.bounds, strict=True)]
    return _taken(torch.cat(parts), task.back)


def _taken(x: Tensor, examples: Tensor | None) -> Tensor:
    """Examples in another order. (`x[examples]` has a slower backward pass.)"""
    return x if examples is None else x.index_select(0, examples)


BASELINES: dict[str, Baseline] = {
    "dense": dense,
    "multiply": multiply,
    "loop": loop,
    "gating": gating,
    "packed": packed,
    "bsr": bsr,
}

# What a table says of each implementation, the project's own ones first.
EXPLAINED = {
    "dense": "the whole network as PyTorch runs it, without masks",
    "full": "our dense: the whole network through fastmask, with the same matrix products as its subnetworks",
    "fastmask": "each language's subnetwork, dead units skipped; a step ends with torch's fused AdamW",
    "live": "the same, and the step ends with LiveAdamW, which moves live weights only",
    "sparse": 'attach(forward="full"): the whole network runs, masks say what each language may change; LiveAdamW',
    "multiply": "weight times mask, or gradient times mask; one language at a time (LaSS, composable-sft)",
    "loop": "gather each language's examples and live weights, multiply, put the results back",
    "gating": "dense products, and dead units set to zero before or after them",
    "packed": "torch's grouped_mm over copies of each language's live rows",
    "compact": "a model cut down to one language: what masking could reach, and no way to share weights",
    "bsr": "PyTorch's block-sparse rows, one matrix for each language; forward only",
}


def why_not(name: str, kind: str, present: int, dtype: str = "float32", compiled: bool = False) -> str | None:
    """Why a rival cannot compute a mask of some kind for so many languages in one batch; None if it can.

    Args:
        name: of `BASELINES`.
        kind: "rows", "columns", "blocks" or "weights".
        present: languages of the batch.
        dtype: of the products.
        compiled: whether it runs under `torch.compile`.
    """
    if name == "multiply" and present > 1:
        return "it has one mask for a whole batch"
    if name in ("gating", "packed") and kind not in ("rows", "columns"):
        return "it is for rows and columns"
    if compiled and name in ("packed", "bsr") and dtype == "float32":
        return "torch.compile knows no such product in float32"
    if name == "packed" and not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    if name == "bsr" and (kind != "blocks" or dtype != "float32"):
        return "block-sparse rows are for masks over blocks, in float32"
    return None


class BaselineLinear(nn.Module):
    """A rival in the place of an `nn.Linear`, with its Parameters, for one fixed batch of languages."""

    def __init__(self, linear: nn.Linear, task: Task, baseline: Baseline) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.task, self.baseline = task, baseline

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in] -> [B, ..., out]."""
        return self.baseline(x, self.weight, self.task, self.bias)
