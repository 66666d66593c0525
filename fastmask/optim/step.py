"""The step of AdamW where a part of the parameters is dead: PyTorch's fused step, and on a GPU a kernel.

The fused step takes stretches of memory and cannot jump over what is dead in between. Whole parameters go to it, and
stretches of live rows, all in one call. Anything else it steps with its dead part, whose old numbers are put aside
before and put back afterwards, as bits: not even NaN leaves a trace.

Embeddings are stepped by rows: a batch looks up a few thousand of the hundred thousand pieces of a multilingual
vocabulary, and a dense gradient, its norm and a step over table and moments would read and write all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastmask import triton_path
from fastmask.live import WHOLE, Live
from fastmask.masks import INTEGERS

STRETCH = 1 << 10  # weights for each thread: shorter stretches take longer to hand over than to step
PIECE = 1 << 15  # weights for each thread: with what is put aside, float32 fills half of a usual cache
FEW = 1 / 64  # share of dead weights up to which they are put aside one by one

Views = MutableMapping[Tensor, tuple[list[int], list[Sequence[Tensor]]]]
"""Live stretches of a parameter and its moments, which take as long to make as to step, and where those three lie."""


class Update(NamedTuple):
    """One parameter's step: tensors of one shape on one device; how many steps it has taken, float32 []; what moves.

    put_back: where the tensors are copies, writes what the step has made of them to where they came from.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    live: Live
    put_back: Callable[[], object] | None = None

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the step changes."""
        return self.parameter, self.exp_avg, self.exp_avg_sq


def take_step(updates: Sequence[Update], options: dict[str, Any], views: Views) -> None:
    """Take the step of parameters that share their options.

    Args:
        updates: of each parameter that has a gradient.
        options: lr, a number or a tensor of one; beta1, beta2, eps, weight_decay, numbers; maximize.
        views: kept from step to step while the same weights live.
    """
    fused: list[Update] = []
    for update in updates:
        if _fits(update):
            fused.append(update)
        else:
            _with_dead_put_back(update, partial(_plain, update, options))
    if fused:
        torch._foreach_add_([update.step for update in fused], 1)
    at_once: list[tuple[Tensor, ...]] = []
    launched: list[Update] = []
    for update in fused:
        p, live = update.parameter, update.live
        if live.kind == "whole":
            at_once.append(update[:5])
        elif _has_kernel(p):
            launched.append(update)
        elif live.kind == "rows" and p.numel() * live.share >= STRETCH * torch.get_num_threads() * len(live.runs) / 2:
            at_once += _stretches(update, views)
        elif p.is_cuda or live.share >= 1 - FEW:
            _with_dead_put_back(update, partial(_fused, [update[:5]], options))
        else:
            _by_pieces(update, options)
    _fused(at_once, options)
    if launched:
        from fastmask_kernels.live_adamw import Job, live_adamw

        jobs = [Job(*update[:5], update.live.words, update.live.cell) for update in launched]
        live_adamw(jobs, **options | {"lr": _rate(options["lr"], jobs[0].parameter)})
    for update in updates:
        if update.put_back is not None:
            update.put_back()


def _fits(update: Update) -> bool:
    """Whether PyTorch's fused step can take the parameter, if all of it lives: it takes memory as it comes."""
    p = update.parameter
    return (
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and all(tensor.dtype == p.dtype and tensor.is_contiguous() for tensor in update[:4])
    )


def _has_kernel(p: Tensor) -> bool:
    return p.is_cuda and triton_path.why_not(p, [p]) is None


def _fused(updates: Sequence[tuple[Tensor, ...]], options: dict[str, Any]) -> None:
    """The step of whole tensors (parameter, gradient, exp_avg, exp_avg_sq, and step, which has been counted)."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for update in updates:
        groups.setdefault((update[0].device, update[0].dtype), []).append(update)
    for group in groups.values():
        p, g, m, v, steps = map(list, zip(*group, strict=True))
        lr = _rate(options["lr"], p[0])
        torch._fused_adamw_(p, g, m, v, [], steps, amsgrad=False, **options | {"lr": lr})


def _rate(lr: float | Tensor, parameter: Tensor) -> float | Tensor:
    """A learning rate on a GPU stays there, so that nothing waits for it."""
    return lr.to(parameter.device) if isinstance(lr, Tensor) and lr.is_cuda and parameter.is_cuda else float(lr)


def _plain(update: Update, options: dict[str, Any]) -> None:
    """The step of a whole parameter that the fused step does not take; it counts, too."""
    p, g, m, v, steps = ([tensor] for tensor in update[:5])
    adamw(p, g, m, v, [], steps, False, fused=False, amsgrad=False, has_complex=p[0].is_complex(), **options)


def _with_dead_put_back(update: Update, step: Callable[[], None]) -> None:
    """The step of a whole parameter, and what is dead of it as it was before."""
    held = () if update.live.kind == "whole" else update.held
    old = [update.live.dead.read(tensor) for tensor in held]
    step()
    for tensor, values in zip(held, old, strict=True):
        update.live.dead.write(tensor, values)


def _stretches(update: Update, views: Views) -> list[tuple[Tensor, ...]]:
    """The update of each run of live rows."""
    addresses = [tensor.data_ptr() for tensor in update.held]
    made = views.get(update.parameter)
    if made is None or made[0] != addresses:
        made = addresses, [tensor.detach().split(update.live.runs)[1::2] for tensor in update.held]
        views[update.parameter] = made
    p, m, v = made[1]
    return list(zip(p, update.gradient.split(update.live.runs)[1::2], m, v, itertools.repeat(update.step)))


def _by_pieces(update: Update, options: dict[str, Any]) -> None:
    """The step of one group of rows after the other, while what was put aside of it is still in a cache."""
    p, *_, step, live, _ = update
    kind, options = INTEGERS[p.element_size()], options | {"lr": _rate(options["lr"], p)}
    rows = max(1, PIECE * torch.get_num_threads() * len(p) // p.numel())
    own = live.keep(p).to(kind)  # 1 and 0
    owns = own.split(rows) if len(own) == len(p) else itertools.repeat(own)
    aside = torch.empty(3, *p[:rows].shape, dtype=kind, device=p.device)
    for own, p, g, m, v in zip(owns, *(tensor.split(rows) for tensor in update[:4]), strict=False):
        dead = own - 1  # no bits and all bits
        held = p.view(kind), m.view(kind), v.view(kind)
        old = [torch.bitwise_and(now, dead, out=there[: len(now)]) for now, there in zip(held, aside, strict=True)]
        torch._fused_adamw_([p], [g], [m], [v], [], [step], amsgrad=False, **options)
        for now, before in zip(held, old, strict=True):
            torch.addcmul(before, now, own, out=now)  # in one pass; `where` takes five times as long


# ---- embeddings by rows


def can_be_sparse(module: nn.Module) -> bool:
    """Whether a module is an embedding that can hand out sparse gradients, and does not yet."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or getattr(module, "mode", "sum") == "max":
        return False
    return not module.sparse and not module.scale_grad_by_freq and module.max_norm is None


@contextmanager
def sparse_gradients(tables: Iterable[nn.Module]) -> Iterator[None]:
    """Let embeddings (those that `can_be_sparse`) hand out sparse gradients of forward passes inside."""
    changed = list(tables)
    for table in changed:
        table.sparse = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for table in changed:
            table.sparse = False  # type: ignore[assignment]


@torch.no_grad()
def by_rows(parameter: Tensor) -> None:
    """Make the gradient of a table [V, D] sparse: the rows with anything but zeros, each once."""
    if parameter.grad is not None:
        sparse = (parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)).coalesce()
        moved = sparse.values().any(1)  # padding is looked up and has no gradient
        held = sparse.indices()[:, moved], sparse.values()[moved], sparse.shape
        parameter.grad = torch.sparse_coo_tensor(*held, is_coalesced=True, check_invariants=False)


def update_of_rows(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Update:
    """The step of the rows of a table [V, D] that a sparse gradient holds; all others, moments too, stay as they are.

    Raises:
        RuntimeError: a gradient with another number of sparse dimensions than 1.
    """
    if gradient.sparse_dim() != 1:
        raise RuntimeError(
            f"LiveAdamW takes sparse gradients of rows (1 sparse dimension), given {gradient.sparse_dim()}"
        )
    gradient = gradient.coalesce()
    rows, tables = gradient.indices()[0], (parameter, state["exp_avg"], state["exp_avg_sq"])
    p, m, v = moved = [table.index_select(0, rows) for table in tables]

    def put_back() -> None:
        for table, values in zip(tables, moved, strict=True):
            table.index_copy_(0, rows, values)

    return Update(p, gradient.values(), m, v, state["step"], WHOLE, put_back)
