"""What people would use instead: each baseline in a few lines of plain PyTorch, on any device, differentiable.

All have one signature: `baseline(x [B, ..., K], weight [N, K], task, bias [N] or None) -> y [B, ..., N]`. A `Task`
holds what a program can prepare once for a mask and a batch's language ids; no baseline pays for that when it is timed.
`dense` ignores the masks; the others compute `fastmask.masked_linear`. `packed` does so as an attached model does: the
masked side is as wide as the widest language, live units in front.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.masks import Mask

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineLinear",
    "Task",
    "bsr",
    "dense",
    "gating",
    "grouped",
    "loop",
    "multiply",
    "packed",
    "stack",
    "why_not",
]

FULL = -1  # the language id of the full, unmasked network


class Task:
    """A mask and the languages of a batch, prepared: the languages present, their examples, and what each owns.

    Args:
        mask: masks of L languages, on the device that the baseline will run on.
        language_ids: int64 [B], -1 (the full network) to L - 1.

    Attributes:
        languages: the G languages present, ascending.
        examples: int64 indices of each one's examples.
        bounds, ends: where each one's examples begin and end once sorted; the ends again as int32 [G].
        order, back: int64 [B]; examples sorted by language, and where each is after sorting. None if they are sorted.
        slots: int64 [G, most]; examples in a table with one row a language, spare places repeat example 0.
        places, slot_of: the table flattened, and where each example is in it. None if that is the batch as it is.
        live: of row and column masks, the units each language owns, int64.
        units, padding: of row and column masks, the same as a table [G, most], as wide as the widest of all languages;
            bool [G, most], what is padding, or None.
        row_of: of row and column masks, the table's row of each example, int64 [B].
        keep: bool [G, N, K] for the languages present; of row and column masks a view of [G, N] or [G, K].
        gates: of row and column masks, the units of each example, bool [B, N] or [B, K].
        block: (bn, bk) of block masks, else None.
    """

    def __init__(self, mask: Mask, language_ids: Tensor) -> None:
        ids, device = language_ids.to(mask.device), mask.device
        self.kind, self.n_examples = mask.kind, len(ids)
        self.languages = sorted(set(ids.tolist()))
        self.examples = [(ids == language).nonzero().flatten() for language in self.languages]
        counts = [len(own) for own in self.examples]
        self.bounds = list(pairwise([0, *torch.tensor(counts).cumsum(0).tolist()]))
        self.ends = torch.tensor([last for _, last in self.bounds], dtype=torch.int32, device=device)
        order = torch.cat(self.examples) if counts else ids
        self.order, self.back = _unless_trivial(order), _unless_trivial(torch.argsort(order))
        most = max(counts, default=0)
        self.slots = torch.zeros(len(counts), most, dtype=torch.int64, device=device)
        slot_of = torch.zeros_like(ids)
        for row, own in enumerate(self.examples):
            self.slots[row, : len(own)] = own
            slot_of[own] = row * most + torch.arange(len(own), device=device)
        self.places, self.slot_of = _unless_trivial(self.slots.flatten()), _unless_trivial(slot_of)
        present = [language + 1 for language in self.languages]  # 0 is the full network
        self.live: list[Tensor] = []
        self.gates: Tensor | None = None
        if mask.kind in ("rows", "columns"):
            units = _units(mask)
            self.live = [units[language].nonzero().flatten() for language in present]
            self.gates = units[ids + 1]
            counts_of = units.sum(1)
            wide = max(counts_of[1:].max(), counts_of[present].max()) if present else 0
            count = counts_of[present, None]
            padding = torch.arange(int(wide), device=device) >= count
            self.padding = padding if bool(padding.any()) else None
            order = torch.sort(units[present].to(torch.int8), dim=1, descending=True, stable=True).indices
            self.units = order[:, : int(wide)].masked_fill(padding, 0)
            self.row_of = torch.searchsorted(torch.tensor(self.languages, device=device), ids)
            shape = (len(present), mask.out_features, mask.in_features)
            own = units[present]
            self.keep = (own[:, :, None] if mask.kind == "rows" else own[:, None, :]).expand(shape)
        else:
            every = mask.to_dense()
            self.keep = torch.cat([torch.ones_like(every[:1]), every])[present]
        self.block = tuple(mask.geometry) if mask.kind == "blocks" else None
        self._block_sparse: dict[int, list[Tensor]] = {}

    def block_sparse(self, weight: Tensor) -> list[Tensor]:
        """The masked weights of the languages present in PyTorch's block-sparse rows (BSR), made once for a weight.

        Raises:
            ValueError: not a mask over blocks.
        """
        if self.block is None:
            raise ValueError(f"block-sparse rows are for masks over blocks, not {self.kind}")
        made = self._block_sparse.get(weight.data_ptr())
        if made is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch calls them beta
                made = [(weight.detach() * keep).to_sparse_bsr(self.block) for keep in self.keep]
            self._block_sparse[weight.data_ptr()] = made
        return made


def _units(mask: Mask) -> Tensor:
    """Bool [1 + L, N or K]: the units of the full network, then of each language."""
    size = mask.out_features if mask.kind == "rows" else mask.in_features
    units = torch.zeros(1 + mask.n_languages, size, dtype=torch.bool, device=mask.device)
    units[0] = True
    for language, count in enumerate(mask.live_counts()):
        units[1 + language, mask.index[language, :count]] = True
    return units


def _unless_trivial(examples: Tensor) -> Tensor | None:
    """None for examples that are in order already: a program that sorts its batches moves nothing."""
    return None if torch.equal(examples, torch.arange(len(examples), device=examples.device)) else examples


Baseline = Callable[[Tensor, Tensor, Task, Tensor | None], Tensor]


def dense(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: no masks at all."""
    return F.linear(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, W * M_l)`: one language for the whole batch."""
    if len(task.languages) > 1:
        raise ValueError(f"one mask for a whole batch: given the languages {task.languages}")
    if not task.languages:
        return F.linear(x, weight, bias)
    return F.linear(x, weight * task.keep[0], _gated(bias, task, 0))


def loop(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """Gather each language's examples, multiply with its live (or masked) weight, put the results back."""
    if not task.languages:
        return F.linear(x, weight, bias)
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


def stack(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """One masked copy of the weight for each language present, one batched product; short groups are filled up."""
    if not task.languages:
        return F.linear(x, weight, bias)
    G, most = task.slots.shape
    table = _taken(x, task.places).reshape(G, -1, x.shape[-1])
    y = torch.bmm(table, (weight * task.keep).transpose(1, 2))
    y = y.reshape(G * most, *x.shape[1:-1], weight.shape[0])
    return _with_bias(_taken(y, task.slot_of), task, bias)


def grouped(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`stack` by `grouped_mm`: groups of any size, nothing to fill up."""
    if not task.languages:
        return F.linear(x, weight, bias)
    tokens = x[0, ..., 0].numel()
    if torch.is_autocast_enabled(x.device.type):  # which `grouped_mm` knows nothing of
        x, weight = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight))
    ordered, copies = _taken(x, task.order), (weight * task.keep).transpose(1, 2)
    y = F.grouped_mm(ordered.reshape(-1, x.shape[-1]), copies, offs=task.ends * tokens)
    return _with_bias(_taken(y.reshape(*ordered.shape[:-1], weight.shape[0]), task.back), task, bias)


def packed(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`grouped_mm` over copies of each language's live rows (columns): ragged and compact, by the vendor's kernels.

    A row mask makes [B, ..., most], a column mask takes it; what is behind the live units of x must be zero.
    """
    if task.gates is None:
        raise ValueError(f"live rows are those of masks over rows or columns, not {task.kind}")
    if not task.languages:
        return x.new_zeros(*x.shape[:-1], task.units.shape[1] if task.kind == "rows" else weight.shape[0])
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
    if task.kind == "columns":
        return y + bias
    own = bias[task.units] if task.padding is None else bias[task.units].masked_fill(task.padding, 0)
    return y + own[task.row_of].reshape(task.n_examples, *[1] * (y.ndim - 2), -1)


def gating(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """Y = r o (W (c o x)): exact for masks over rows and columns, at dense cost."""
    if task.gates is None:
        raise ValueError(f"gates are for masks over rows or columns, not {task.kind}")
    gates = task.gates.reshape(task.n_examples, *[1] * (x.ndim - 2), -1)
    if task.kind == "rows":
        return F.linear(x, weight, bias) * gates
    return F.linear(x * gates, weight, bias)


def bsr(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`loop` over weights kept as PyTorch's block-sparse rows: forward only, masks over blocks."""
    if not task.languages:
        return F.linear(x, weight, bias)
    ordered = _taken(x, task.order)
    weights = task.block_sparse(weight)
    parts = [F.linear(ordered[first:last], own, bias) for own, (first, last) in zip(weights, task.bounds, strict=True)]
    return _taken(torch.cat(parts) if len(parts) > 1 else parts[0], task.back)


BASELINES: dict[str, Baseline] = {
    "dense": dense,
    "multiply": multiply,
    "loop": loop,
    "stack": stack,
    "grouped": grouped,
    "packed": packed,
    "gating": gating,
    "bsr": bsr,
}


def why_not(name: str, kind: str, present: int, *, backward: bool, half: bool) -> str | None:
    """Why a baseline cannot compute a mask of some kind for so many languages in one batch; None if it can.

    Args:
        name: of `BASELINES`.
        kind: "rows", "columns", "blocks" or "weights".
        present: languages of the batch.
        backward: whether gradients are needed.
        half: whether products are in bfloat16.
    """
    if name == "multiply" and present > 1:
        return "it has one mask for a whole batch"
    if name in ("gating", "packed") and kind in ("blocks", "weights"):
        return "it is for rows and columns"
    if name in ("grouped", "packed") and not (half and hasattr(F, "grouped_mm")):
        return "grouped_mm has a fast path for bfloat16 only"
    if name == "bsr" and (kind != "blocks" or backward):
        return "block-sparse rows have no gradient, and are for masks over blocks"
    return None


class BaselineLinear(nn.Module):
    """A baseline in the place of an `nn.Linear`, with its Parameters, for one fixed batch of languages."""

    def __init__(self, linear: nn.Linear, task: Task, baseline: Baseline) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.task, self.baseline = task, baseline

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in] -> [B, ..., out]."""
        return self.baseline(x, self.weight, self.task, self.bias)


def _taken(x: Tensor, examples: Tensor | None) -> Tensor:
    """Examples in another order. (`x[examples]` has a slower backward pass.)"""
    return x if examples is None else x.index_select(0, examples)


def _gated(bias: Tensor | None, task: Task, g: int) -> Tensor | None:
    """A row mask gates the bias with its row."""
    return bias * task.keep[g, :, 0] if bias is not None and task.kind == "rows" else bias


def _with_bias(y: Tensor, task: Task, bias: Tensor | None) -> Tensor:
    if bias is None:
        return y
    if task.kind != "rows":
        return y + bias
    assert task.gates is not None
    return y + (bias * task.gates).reshape(task.n_examples, *[1] * (y.ndim - 2), -1)
