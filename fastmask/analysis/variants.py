"""Losses of many variants of one subnetwork in one batch: each variant lacks, or is given, one unit of a layer.

One variant at a time, every pass would go through the whole model. Here the examples are repeated once for each
variant, and what the repeats have in common is computed once:

- below the layer nothing differs, so layers run on one copy of the examples;
- in the layer, the units are computed once, live and dead alike. The projection that consumes them is linear: its
  output for a variant is that of the subnetwork, less (or plus) what it makes of the one unit;
- from there on the variants differ, and run through the language's subnetwork as one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastmask.models.attach import attached, language, owner_of
from fastmask.models.layers import AttachedLinear
from fastmask.models.routing import Route, Router
from fastmask.models.structure import layers_of
from fastmask.torch_path.activations import activate

__all__ = ["flipped_losses", "repeated"]


def flipped_losses(
    model: nn.Module,
    language_name: str,
    units: str,
    layer: int,
    which: list[int],
    batch: Any,
    examples: int,
    loss: Callable[[Any], Tensor],
    repeat: Callable[[Any, int], Any],
) -> Tensor:
    """The loss of each example with one unit of a layer flipped (removed if owned, given if not), [variants, B].

    Args:
        model: attached, with masks over `units`, in eval mode.
        language_name: whose subnetwork is varied.
        units: "heads" or "neurons".
        layer: in which units are flipped.
        which: the units, one for each variant.
        batch: what `loss` takes.
        examples: B, of the batch.
        loss: runs the model once -> [examples].
        repeat: (batch, n) -> the batch n times, one after the other.

    Raises:
        ValueError: the repeated batch has another number of losses than it should.
    """
    state, owner = attached(model), owner_of(model)
    own = getattr(state.subnets, units)[state.subnets.index(language_name), layer]
    group, layers = state.structure.groups(units)[layer], layers_of(owner, state.structure)
    if not len(layers) == len(state.structure.attentions) == len(state.structure.ffns):
        raise ValueError("expected a model of one stack of layers, each with one attention and one FFN")
    attention = owner.get_submodule(next(iter(state.structure.attentions[layer].rows)).rpartition(".")[0])
    times = len(which)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(language(model, language_name))
        for below in layers[:layer]:
            stack.enter_context(_on_one_copy(below, examples, times))
        # Heads: from here to the consumer there is one copy only. Neurons: the attention before them does not differ.
        stack.enter_context(_on_one_copy(attention, examples, times, again=units == "neurons"))
        for name in group.rows:
            maker = owner.get_submodule(name)
            stack.enter_context(_all_units(maker, state.router))
            if units == "neurons":
                stack.enter_context(_on_one_copy(maker, examples, times, again=False))
        stack.enter_context(_varied(owner.get_submodule(group.columns[0]), own[: group.units], which))
        losses = loss(repeat(batch, times))
    if losses.shape != (times * examples,):
        raise ValueError(
            f"the loss of a batch of {examples} examples repeated {times} times has shape {tuple(losses.shape)}"
        )
    return losses.view(times, examples)


@contextmanager
def _on_one_copy(module: nn.Module, examples: int, times: int, again: bool = True) -> Iterator[None]:
    """Run a module on the first of `times` equal repeats, and repeat what it returns unless `again` is False."""

    def first(value: Any) -> Any:
        return value[:examples] if isinstance(value, Tensor) and value.shape[:1] == (times * examples,) else value

    def tiled(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:1] == (examples,):
            return value.expand(times, *value.shape).flatten(0, 1)
        return value

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = [value.shape[0] for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim]
        if times * examples not in given:
            raise ValueError(
                f"a batch of {examples} examples repeated {times} times reached the model with "
                f"{max(given, default=0)}, expected {times * examples}: "
                "repeat=(batch, n) must return the whole batch n times"
            )
        return tree_map(first, args), tree_map(first, kwargs)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True)]
    if again:
        handles.append(module.register_forward_hook(lambda module, args, output: tree_map(tiled, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _all_units(maker: nn.Module, router: Router) -> Iterator[None]:
    """Let a projection compute the units of the full network."""
    assert isinstance(maker, AttachedLinear)
    own, full = maker.router, Router(router.languages)
    full.running.route = Route(-1, (-1,))
    maker.router = full
    try:
        yield
    finally:
        maker.router = own


@contextmanager
def _varied(consumer: nn.Module, own: Tensor, which: list[int]) -> Iterator[None]:
    """Let the projection that consumes all units [B, ..., units * size] give the outputs of all variants, in turn."""
    assert isinstance(consumer, AttachedLinear)
    flipped = torch.tensor(which, device=consumer.weight.device)

    def forward(x: Tensor) -> Tensor:
        x = activate(x, consumer.activation)
        of_units = x.unflatten(-1, (len(own), -1))
        keep = own.to(x.device)
        base = F.linear((of_units * keep[:, None]).flatten(-2), consumer.matrix, consumer.bias)
        rows = of_units[..., flipped, :].movedim(-2, 0).flatten(1, -2)  # [variants, B * ..., size]
        columns = consumer.matrix.unflatten(1, (len(own), -1))[:, flipped].permute(1, 2, 0)  # [variants, size, N]
        makes = torch.bmm(rows, columns).unflatten(1, base.shape[:-1])
        sign = torch.where(keep[flipped], -1, 1).to(makes.dtype).view(-1, *[1] * base.ndim)
        return makes.mul_(sign).add_(base).flatten(0, 1)

    consumer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del consumer.forward


def repeated(batch: Any, times: int) -> Any:
    """A tensor, or a mapping, tuple or list of tensors, with its first dimension repeated as a whole.

    Raises:
        ValueError: something that cannot be repeated so; the analysis then needs a `repeat` of its own.
    """
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.repeat(times, *[1] * (batch.ndim - 1))
    if isinstance(batch, Mapping):
        return {name: repeated(value, times) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(repeated(value, times) for value in batch)
    raise ValueError(f"a batch that holds a {type(batch).__name__} cannot be repeated: give repeat=(batch, n) -> batch")
