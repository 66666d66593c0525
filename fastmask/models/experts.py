"""Mixtures of experts: where their neurons lie, and the module that runs them in an attached model.

Neuron i of a layer is neuron i of each of its routed experts: which expert a token goes to is up to the router, so a
language owns the same part of all of them. Experts are run once for each subnetwork, on the tokens of its languages. A
module of experts computes what it is given parameters for: so it runs as it is, whichever implementation transformers
chooses, with the live neurons of a language copied out of its parameters, and as many fewer products.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.masks import FULL, Mask
from fastmask.models.families import Projections
from fastmask.models.routing import Router

_STEP = 8  # packed widths are multiples of it: grouped products want rows that begin at a multiple of 16 bytes


@dataclass(frozen=True)
class Stacked:
    """A parameter that holds something of every expert, and where the neurons lie in it."""

    name: str  # below its module
    dim: int  # along which neurons lie
    parts: int = 1  # how many entries along `dim` a neuron has: 2 where gate and up are one parameter
    interleaved: bool = False  # whether these lie side by side; otherwise all gates come first, and then all ups
    read: bool = False  # whether it reads neurons (down), and does not compute them

    def entries(self, neurons: Tensor, n: int) -> Tensor:
        """Where some neurons (int64 [live]) of n lie along `dim`, int64 [live * parts]."""
        if self.interleaved:
            return (neurons[:, None] * self.parts + torch.arange(self.parts, device=neurons.device)).flatten()
        return torch.cat([neurons + part * n for part in range(self.parts)])

    def beside(self, keep: Tensor, parameter: Tensor) -> Tensor:
        """Flags of neurons, [n], as flags that broadcast to the parameter."""
        entries = keep.repeat_interleave(self.parts) if self.interleaved else keep.repeat(self.parts)
        return entries.view(*[-1 if dim == self.dim else 1 for dim in range(parameter.ndim)])


def stacked_in(module: nn.Module, layout: Projections) -> tuple[int, tuple[Stacked, ...]] | None:
    """How many neurons each of a module's experts has, and the parameters they lie in; None if it holds no experts.

    A module of experts has the projections of a layout as parameters of its own, [experts, out, in] or [experts, in,
    out], perhaps with biases, and nothing else. It is called with tokens, the experts of each token and their weights:
    what was sorted by experts before has lost which example it belongs to.
    """
    parameters: dict[str, Any] = module._parameters
    *makers, reader = names = (*layout.rows, layout.columns)
    weights: list[Any] = [parameters.get(name) for name in names]
    biases = {f"{name}_bias" for name in names}
    if any(weight is None or weight.ndim != 3 for weight in weights) or parameters.keys() - biases - {*names}:
        return None
    if len(inspect.signature(getattr(module, "plain", module).forward).parameters) != 3:
        return None
    orders = (1, 2), (2, 1)  # (dimension of outputs, of inputs), the likelier first: shapes do not always tell
    for out, into in orders[::-1] if getattr(module, "is_transposed", False) else orders:
        n, shapes = weights[-1].shape[into], [weight.shape for weight in weights[:-1]]
        parts = [shape[out] // n for shape in shapes]
        wanted = [(part * n, weights[-1].shape[out]) for part in parts]
        if [(shape[out], shape[into]) for shape in shapes] == wanted and parts in ([1], [2], [1, 1]):
            break
    else:
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    found = [Stacked(reader, into, read=True)]
    for name, part in zip(makers, parts, strict=True):
        found.append(Stacked(name, out, part, interleaved and part > 1))
        if parameters.get(f"{name}_bias") is not None:
            found.append(Stacked(f"{name}_bias", 1, part, interleaved and part > 1))
    return n, tuple(found)


class AttachedExperts(nn.Module):
    """A module of experts that looks like the `plain` one it replaces, and shares all it holds.

    Its mask is over columns, those of any expert's down projection. If it `packs`, dead neurons are left out; otherwise
    all are computed, and dead ones not read.
    """

    def __init__(
        self, plain: nn.Module, mask: Mask, stacked: Sequence[Stacked], router: Router, packs: bool = True
    ) -> None:
        super().__init__()
        # The same dictionaries: loading and sharding replace Parameters, and old ones must not live on.
        self._parameters, self._buffers, self._modules = plain._parameters, plain._buffers, plain._modules
        vars(self)["plain"] = plain  # not as a module, which would be in all names
        self.training = plain.training
        self.stacked, self.router, self.packs = tuple(stacked), router, packs
        self.mask = mask
        # A graph ends here: which subnetworks run on how many tokens is known only now, and traced, the loop over them
        # would be compiled anew for every batch. Not where the class is made, as this loads the compiler.
        if not hasattr(AttachedExperts.forward, "_torchdynamo_disable"):
            AttachedExperts.forward = torch.compiler.disable(AttachedExperts.forward)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        # Models look at how many experts there are. What others have hung on the plain module (`_hf_hook`) stays there.
        mine = name.startswith("_") or name == "plain" or name in self._parameters or name in self._modules
        return super().__getattr__(name) if mine else getattr(self.plain, name)

    @property
    def mask(self) -> Mask:
        """The mask; it may be replaced."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._mask = mask
        if mask.extents.is_meta:  # moved to where nothing has values: what was found before holds
            return
        counts, index = mask.live_counts(), mask.index.cpu()
        live = [index[language, :count] for language, count in enumerate(counts)]
        first: dict[tuple[int, ...], int] = {tuple(range(mask.in_features)): FULL}
        # Languages with the same neurons are the first of them, and all with everything are the full network.
        self._same = [first.setdefault(tuple(own.tolist()), language) for language, own in enumerate(live)]
        self._live = {language: live[language] for language in self._same if language != FULL}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [n, in], and what the plain module takes beside them, [n, ...] each -> [n, in]."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if x.ndim != 2:
            raise ValueError(f"expected tokens as [tokens, in] where experts are masked, given {list(x.shape)}")
        route = self.router.current()
        present = None
        if route.present is not None:
            present = sorted({FULL if language == FULL else self._same[language] for language in route.present})
        if present is not None and len(present) == 1:
            return self._run(self._parameters_of(present)[0], args, kwargs)
        of_tokens = torch.tensor([*self._same, FULL], device=x.device)[route.examples(x)[1]]
        subnetworks, in_each = of_tokens.unique(return_counts=True)
        present, counts = subnetworks.tolist(), in_each.tolist()
        in_order = bool((of_tokens[1:] >= of_tokens[:-1]).all())
        order = None if in_order else of_tokens.argsort(stable=True)

        def pieces(value: Any) -> Sequence[Any]:
            if not isinstance(value, Tensor) or value.shape[:1] != x.shape[:1]:
                return [value] * len(counts)
            return (value if order is None else value.index_select(0, order)).split(counts)

        of_args, of_kwargs = [pieces(value) for value in args], {name: pieces(value) for name, value in kwargs.items()}
        outputs = [
            self._run(own, [piece[i] for piece in of_args], {name: piece[i] for name, piece in of_kwargs.items()})
            for i, own in enumerate(self._parameters_of(present))
        ]
        output = torch.cat(outputs)
        return output if order is None else output.index_select(0, order.argsort())

    def _run(self, parameters: dict[str, Tensor | None], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        # A copy, and not other parameters for a while: several threads may run the model.
        module: Any = copy.copy(self.plain)
        vars(module)["_parameters"] = parameters
        module.training = self.training
        # Of the class: on the instance there may be what accelerate has put there, and moved to this layer.
        output: Tensor = type(module).forward(module, *args, **kwargs)
        return output

    def _parameters_of(self, subnetworks: Sequence[int]) -> list[dict[str, Tensor | None]]:
        """The parameters that each subnetwork runs with, by name."""
        found: list[dict[str, Tensor | None]] = [dict(self._parameters) for _ in subnetworks]
        masked = [(own, subnetwork) for own, subnetwork in zip(found, subnetworks, strict=True) if subnetwork != FULL]
        for stacked in self.stacked if masked else ():
            parameter: Any = getattr(self, stacked.name)
            self._live |= {language: self._live[language].to(parameter.device) for _, language in masked}
            live = [self._live[language] for _, language in masked]
            full, n = self.router.full_forward, self.mask.in_features
            if full or self.packs:
                entries = [stacked.entries(own if full else _padded(own), n) for own in live]
                made = _Some.apply(parameter, stacked.dim, full, *entries)
                if stacked.read and not full:  # what stands in for neurons that are not there is not read
                    made = [_cleared(stacked, part, len(own)) for part, own in zip(made, live, strict=True)]
            elif stacked.read:
                none = torch.zeros(n, dtype=torch.bool, device=parameter.device)
                made = [parameter * stacked.beside(none.index_fill(0, own, True), parameter) for own in live]
            else:
                continue
            for (own, _), part in zip(masked, made, strict=True):
                own[stacked.name] = part
        return found

    @torch.no_grad()
    def clear(self, language: int) -> None:
        """Zero what is dead in a language."""
        keep = self._mask.select([language]).to_dense()[0, 0]
        for stacked in self.stacked:
            parameter: Any = getattr(self, stacked.name)
            parameter.masked_fill_(~stacked.beside(keep.to(parameter.device), parameter), 0)


def _padded(live: Tensor) -> Tensor:
    """Indices of neurons, up to a multiple of `_STEP` with that of the first one, or of neuron 0."""
    first = live[:1] if len(live) else live.new_zeros(1)
    return torch.cat([live, first.expand(-len(live) % _STEP if len(live) else _STEP)])


def _cleared(stacked: Stacked, part: Tensor, n: int) -> Tensor:
    """A part of a parameter with zeros behind its first n neurons."""
    there = torch.arange(part.shape[stacked.dim], device=part.device) < n
    return part if len(there) == n else part * stacked.beside(there, part)


class _Some(torch.autograd.Function):
    """Some entries of a parameter along a dimension, several times, with one gradient for all.

    Or, with `whole`, all of it, and the gradient of those entries only.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dim: int, whole: bool, *entries: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*entries)
        ctx.dim, ctx.whole, ctx.shape = dim, whole, parameter.shape
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) if whole else _taken(parameter, dim, own) for own in entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: Tensor | None = None
        for grad, own in zip(grads, ctx.saved_tensors, strict=True):
            if grad is not None:
                found = grad.new_zeros(ctx.shape) if found is None else found
                of_entries = _taken(grad, ctx.dim, own) if ctx.whole else grad
                _flat(found, ctx.dim).index_add_(1, own, _flat(of_entries, ctx.dim))
        return found, None, None, *[None] * len(grads)


def _taken(tensor: Tensor, dim: int, entries: Tensor) -> Tensor:
    """Some entries along a dimension."""
    return _flat(tensor, dim).index_select(1, entries).unflatten(0, tensor.shape[:dim])


def _flat(tensor: Tensor, dim: int) -> Tensor:
    """With one dimension in front of `dim`: what lies along the last of two is copied twenty times as fast."""
    return tensor.flatten(0, dim - 1)
