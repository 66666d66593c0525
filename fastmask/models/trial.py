"""Runs of a tiny batch: language by language with weights times masks, and mixed with the layers of `attach`.

Both record what the projections that read units give. Tokens go to the same experts in both: a router's scores may
differ by a rounding, and its choice then by a whole expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from fastmask.models.around import Around, is_wrapped
from fastmask.models.building import kept_of, put, unit_layers
from fastmask.models.experts import Stacked
from fastmask.models.routing import Route, Router
from fastmask.models.structure import Structure, is_conv1d
from fastmask.models.tiny_batch import EXAMPLES, Inputs
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["Recorded", "Reference", "made_up", "rows_of", "run_attached", "run_multiplied"]

Recorded = dict[str, list[Tensor]]
Routing = dict[str, list[tuple[Any, Any]]]  # what modules of experts are given beside tokens, at each call

_IDS = [0, 1, 0]  # the languages of the examples: not sorted, and not equally many of each


def rows_of(language: int) -> list[int]:
    """Which examples are of a language."""
    return [row for row, own in enumerate(_IDS) if own == language]


def made_up(structure: Structure, kinds: tuple[str, ...]) -> Subnetworks:
    """Two languages whose subnetworks differ in every group that has two units, and in size where it has three."""
    generator = torch.Generator().manual_seed(0)
    keeps: dict[str, Tensor] = {}
    for kind in kinds:
        groups = structure.groups(kind)
        if not groups:
            continue
        keep = torch.zeros(2, len(groups), max(group.units for group in groups), dtype=torch.bool, device="cpu")
        for index, group in enumerate(groups):
            order = torch.randperm(group.units, generator=generator)
            first = max(1, group.units // 2)
            keep[0, index, order[:first]] = True
            keep[1, index, order[first:] if group.units > 1 else order] = True
            if group.units == 4:  # halves would be equally wide
                keep[1, index, order[0]] = True
        keeps[kind] = keep
    return Subnetworks(["a", "b"], keeps.get("heads"), keeps.get("neurons"))


@dataclass(frozen=True)
class Reference:
    """What a run with weights times masks showed.

    Attributes:
        outputs: of every `columns` projection, call by call.
        inputs: which tensor each projection read first.
        routing: what experts were given beside tokens.
    """

    outputs: Recorded
    inputs: dict[str, int]
    routing: Routing


class _Multiplied(nn.Module):
    """A layer whose parameters are multiplied by a mask, and which remembers what it was called with."""

    def __init__(self, linear: nn.Module, keep: Tensor, of_rows: bool, stacked: Sequence[Stacked]) -> None:
        super().__init__()
        self.linear, self.keep, self.of_rows, self.stacked = linear, keep, of_rows, stacked
        self.inputs: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        # Models look at the weight of a layer (its dtype), or at its sizes.
        return super().__getattr__(name) if name == "linear" else getattr(self.linear, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(x)
        layer: Any = self.linear
        keep, of_rows = self.keep.to(x.device), self.of_rows
        if is_wrapped(layer):  # its weight is nowhere as such
            return layer(x) * keep if of_rows else layer(x * keep)
        if self.stacked:
            # Which gate goes with which up is what is to be proven: only what reads the neurons is masked.
            read = {own.name: (own, getattr(layer, own.name)) for own in self.stacked if own.read}
            masked = {name: parameter * own.beside(keep, parameter) for name, (own, parameter) in read.items()}
            return functional_call(layer, masked, (x, *args), kwargs)
        parameters = {"weight": layer.weight * (keep[:, None] if of_rows != is_conv1d(layer) else keep)}
        if of_rows and layer.bias is not None:
            parameters["bias"] = layer.bias * keep
        return functional_call(layer, parameters, (x,))


def run_multiplied(
    model: nn.Module, structure: Structure, subnets: Subnetworks, inputs: Inputs, language: int
) -> Reference:
    """A run of the examples of one language, with weights times its masks."""
    layers: dict[str, _Multiplied] = {}
    for _, group, keep in structure.masked(subnets):
        for name, unit in group.projections.items():
            flags, of_rows = kept_of(keep[language], unit), name in group.rows
            layers[name] = _Multiplied(model.get_submodule(name), flags, of_rows, group.stacked)
    rows = rows_of(language)
    routing: Routing = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: routing.setdefault(name, []).append((args[1:], kwargs))

    hooks = {name: note(name) for name in _experts(structure, subnets)}
    outputs = _run(model, layers, _consumers(structure, subnets), _some(inputs, rows), hooks)
    # Kept until here, so that no two inputs had the same id.
    return Reference(outputs, {name: id(layer.inputs[0]) for name, layer in layers.items() if layer.inputs}, routing)


def run_attached(
    model: nn.Module,
    structure: Structure,
    subnets: Subnetworks,
    inputs: Inputs,
    unpacked: Collection[str],
    apart: Collection[str],
    wanted: list[Reference],
) -> Recorded:
    """A run of all examples, with the layers that `attach` would put in; tokens are routed as in `wanted`."""
    router = Router(subnets.languages)
    layers = unit_layers(model, subnets, router, structure, unpacked, apart)
    with router.using(Route.of(torch.tensor(_IDS, device="cpu"), 2)):
        routing = {name: _routed(name, wanted) for name in _experts(structure, subnets)}
        return _run(model, layers, _consumers(structure, subnets), inputs, routing)


def _routed(name: str, wanted: list[Reference]) -> Callable[..., Any]:
    calls = itertools.count()

    def joined(own: Any, *of_languages: Any) -> Any:
        if not isinstance(own, Tensor):
            return own
        whole = own.unflatten(0, (EXAMPLES, -1)).clone()
        for language, of_language in enumerate(of_languages):
            rows = rows_of(language)
            whole[rows] = of_language.unflatten(0, (len(rows), -1))
        return whole.flatten(0, 1)

    def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = next(calls)
        then = [reference.routing[name][call] for reference in wanted]
        rest, kwargs = tree_map(joined, (args[1:], kwargs), *then)
        return (*args[:1], *rest), kwargs

    return route


def _consumers(structure: Structure, subnets: Subnetworks) -> list[str]:
    return [group.columns[0] for _, group, _ in structure.masked(subnets)]


def _experts(structure: Structure, subnets: Subnetworks) -> list[str]:
    return [group.name for _, group, _ in structure.masked(subnets) if group.stacked]


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module | Around],
    recorded: list[str],
    inputs: Inputs,
    before: Mapping[str, Callable[..., Any]],
) -> Recorded:
    """Run the model with other layers, and hooks that see the arguments of some modules."""
    found: Recorded = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.setdefault(name, []).append(output)

    with _replaced(model, layers):
        handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in recorded]
        for name, hook in before.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _some(inputs: Inputs, rows: list[int]) -> dict[str, Any]:
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (EXAMPLES,) else value
        for name, value in inputs.items()
    }


@contextmanager
def _replaced(model: nn.Module, layers: Mapping[str, nn.Module | Around]) -> Iterator[None]:
    before = put(model, layers)
    try:
        yield
    finally:
        put(model, before)
        for layer in layers.values():
            if isinstance(layer, Around):
                layer.take_off()
