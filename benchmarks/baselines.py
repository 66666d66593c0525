"""What people would use instead: each rival in a few lines of plain PyTorch, on any device, differentiable.

All have one signature: `rival(x [B, ..., K], weight [N, K], task, bias [N] or None) -> y [B, ..., N]`. A `Task` holds
what a program can prepare once, untimed. `dense` ignores the masks; the others compute `fastmask.masked_linear`,
`packed` as an attached model does: the masked side holds live units only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.row import Setting
from fastmask.masks import Mask


class Task:
    """A mask (of L languages) and the languages of a batch (int64 [B], -1 to L - 1), prepared on the mask's device."""

    def __init__(self, mask: Mask, language_ids: Tensor) -> None:
        self.kind, ids = mask.kind, language_ids.to(mask.device)
        # The G languages present, ascending; which of them each example has, int64 [B].
        found, self.row_of, counts = ids.unique(return_inverse=True, return_counts=True)
        self.languages: list[int] = found.tolist()
        self.ends = counts.cumsum(0).to(torch.int32)  # where the examples of each end once sorted, int32 [G]
        self.bounds = list(pairwise([0, *self.ends.tolist()]))
        # Examples sorted by language, and where each is after sorting, int64 [B]; None if they are sorted.
        order = ids.argsort(stable=True)
        is_sorted = torch.equal(order, torch.arange(len(ids), device=ids.device))  # as a loader can give them
        self.order, self.back = (None, None) if is_sorted else (order, order.argsort())
        every = mask.to_dense()
        self.keep = torch.cat([torch.ones_like(every[:1]), every])[found + 1]  # bool, broadcasts to [G, N, K]
        # Of row and column masks: the units of each language, int64; as a table [G, live] where all own equally many;
        # those of each example, bool [B, N] or [B, K].
        self.live: list[Tensor] = []
        self.units: Tensor | None = None
        self.gates: Tensor | None = None
        if mask.kind in ("rows", "columns"):
            along = 2 if mask.kind == "rows" else 1
            units = self.keep.any(along)
            self.keep = units.unsqueeze(along)
            self.live = [flags.nonzero().flatten() for flags in units]
            self.units = torch.stack(self.live) if len(set(map(len, self.live))) == 1 else None
            self.gates = units[self.row_of]
        self.block = mask.geometry  # of block masks (bn, bk)
        self.block_sparse: dict[int, list[Tensor]] = {}  # masked weights by address, see `bsr`


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
    gates = task.gates.reshape(len(x), *[1] * (x.ndim - 2), -1)
    return F.linear(x, weight, bias) * gates if task.kind == "rows" else F.linear(x * gates, weight, bias)


def packed(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`grouped_mm` over copies of each language's live rows (columns), by the vendor's kernels; examples are sorted.

    A row mask makes y [B, ..., live], a column mask takes x [B, ..., live]; all languages own equally many units.
    """
    units = task.units
    if units is None or task.order is not None:
        raise ValueError("live rows are those of masks over rows or columns, equally many each, of sorted examples")
    if torch.is_autocast_enabled(x.device.type):  # which `grouped_mm` knows nothing of
        x, weight = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight))
    rows = weight if task.kind == "rows" else weight.t().contiguous()
    copies = rows.index_select(0, units.flatten()).unflatten(0, units.shape)  # [G, live, K or N]
    if task.kind == "rows":
        copies = copies.transpose(1, 2)
    y = F.grouped_mm(x.reshape(-1, x.shape[-1]), copies, offs=task.ends * x[0, ..., 0].numel())
    y = y.reshape(*x.shape[:-1], copies.shape[2])
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    own = bias if task.kind == "columns" else bias[units][task.row_of].reshape(len(x), *[1] * (y.ndim - 2), -1)
    return y + own


def bsr(x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
    """`loop` over weights kept as PyTorch's block-sparse rows, made once: forward only, masks over blocks."""
    if task.kind != "blocks":
        raise ValueError(f"block-sparse rows are for masks over blocks, not {task.kind}")
    weights = task.block_sparse.setdefault(weight.data_ptr(), [])
    if not weights:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch calls them beta
            weights += [(weight.detach() * keep).to_sparse_bsr(task.block) for keep in task.keep]
    ordered = _taken(x, task.order)
    parts = [F.linear(ordered[first:last], own, bias) for own, (first, last) in zip(weights, task.bounds, strict=True)]
    return _taken(torch.cat(parts), task.back)


def _taken(x: Tensor, examples: Tensor | None) -> Tensor:
    """Examples in another order. (`x[examples]` has a slower backward pass.)"""
    return x if examples is None else x.index_select(0, examples)


BASELINES = {rival.__name__: rival for rival in (dense, multiply, loop, gating, packed, bsr)}

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
    "compact": "fastmask.extract, a model of one language alone: what masking could reach, and no way to share weights",
    "bsr": "PyTorch's block-sparse rows, one matrix for each language; forward only",
}


def why_not(name: str, setting: Setting) -> str | None:
    """Why a rival cannot compute the masks of a setting for the languages of its batch; None if it can."""
    if name == "multiply" and setting.present > 1:
        return "it has one mask for a whole batch"
    if name in ("gating", "packed") and setting.kind not in ("rows", "columns"):
        return "it is for rows and columns"
    if setting.compiled and name in ("packed", "bsr") and setting.dtype == "float32":
        return "torch.compile knows no such product in float32"
    if name == "packed" and not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    if name == "bsr" and (setting.kind != "blocks" or setting.dtype != "float32"):
        return "block-sparse rows are for masks over blocks, in float32"
    if name == "compact" and (setting.unit == "weights" or setting.present > 1):
        return "a compact model holds one language, and single weights make it no smaller"
    return None


class BaselineLinear(nn.Module):
    """A rival in the place of an `nn.Linear`, with its Parameters, for one fixed batch of languages."""

    def __init__(self, linear: nn.Linear, task: Task, baseline: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.task, self.baseline = task, baseline

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in] -> [B, ..., out]."""
        return self.baseline(x, self.weight, self.task, self.bias)


def with_rival(model: nn.Module, baseline: Callable[..., Tensor], tasks: Mapping[str, Task]) -> nn.Module:
    """The model, with a rival in the place of the linear layers that are named."""
    for path, task in tasks.items():
        model.set_submodule(path, BaselineLinear(model.get_submodule(path), task, baseline))  # type: ignore[arg-type]
    return model
