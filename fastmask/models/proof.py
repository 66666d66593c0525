"""`attach` proves itself: a tiny batch through the layers it is about to give out, against weights times masks.

Packed units need attention code that takes any number of heads, and nothing but products and element-wise functions
between the projections of an FFN. Relative position biases, one number for each head, norms over all heads or neurons
break that, in ways that no list of models can foresee. So it is tried: a few examples of two made-up languages run
through the model with packed layers, and with plain ones whose weights were multiplied by masks, and the outputs of
every attention and FFN are compared. What differs works unpacked: each unit in its slot, dead ones zero.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmask.models.around import is_wrapped
from fastmask.models.structure import Structure, UnitGroup
from fastmask.models.tiny_batch import EXAMPLES, Inputs, short, working_inputs
from fastmask.models.trial import Recorded, made_up, rows_of, run_attached, run_multiplied

__all__ = ["Found", "ProofError", "try_layers"]


@dataclass(frozen=True)
class Found:
    """What trying showed, by place (`UnitGroup.place`).

    Attributes:
        unpacked: where units cannot be packed, and why not.
        apart: where the projections do not read the same input, so that there is nothing to compute together.
        untried: where nothing was shown, not even that unpacked units are right.
    """

    unpacked: Mapping[str, str]
    apart: frozenset[str] = frozenset()
    untried: frozenset[str] = frozenset()

    @classmethod
    def nothing(cls, places: Iterable[str], why: str) -> Found:
        """Nothing could be tried."""
        return cls(dict.fromkeys(places, why), untried=frozenset(places))


# Of the largest output; many models compute norms in float32, whatever their dtype.
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2}
_USUAL = 1e-4

_known: dict[str, Found] = {}


class ProofError(ValueError):
    """The model does not compute what its weights times masks would, or cannot be run to see it."""


def try_layers(model: nn.Module, structure: Structure, kinds: tuple[str, ...], example: Inputs | None = None) -> Found:
    """Run a tiny batch through the layers that `attach` would put in, and through weights times masks.

    Args:
        model: plain; it is as it was afterwards.
        structure: of the model.
        kinds: which units are masked: "heads", "neurons" or both.
        example: the arguments of a forward pass of three examples; made from the model's config if not given.

    Raises:
        ProofError: even unpacked layers give something else than weights times masks, or the model reads weights
            without calling the layers that hold them.
    """
    groups = [group for kind in kinds for group in structure.groups(kind)]
    places = dict.fromkeys(group.place for group in groups)
    if any(parameter.is_meta for parameter in model.parameters()):
        return Found.nothing(places, "the model has no weights yet that it could be tried with")
    key = _key(model, structure, kinds) if example is None else None
    if key is not None and key in _known:
        return _known[key]
    with _undisturbed(model), _without_zeros(model, groups):
        found = _tried(model, structure, groups, list(places), kinds, example)
    if key is not None:
        _known[key] = found
    return found


def _tried(
    model: nn.Module,
    structure: Structure,
    groups: list[UnitGroup],
    places: list[str],
    kinds: tuple[str, ...],
    example: Inputs | None,
) -> Found:
    inputs, failure = working_inputs(model, example)
    if inputs is None:
        return Found.nothing(places, f"no tiny batch could be run ({failure}); give attach(..., example=inputs)")
    subnets = made_up(structure, kinds)
    wanted = [run_multiplied(model, structure, subnets, inputs, language) for language in (0, 1)]
    calls = wanted[0].inputs
    _check_called(model, groups, calls, inputs)
    apart = frozenset(group.place for group in groups if len({calls.get(name) for name in group.rows}) > 1)
    unpacked = {
        place: "the tiny batch does not reach it; give attach(..., example=inputs)"
        for place in places
        if not any(group.columns[0] in calls for group in groups if group.place == place)
    }
    untried = frozenset(unpacked)

    def differs(unpacked: Collection[str]) -> str | None:
        try:
            got = run_attached(model, structure, subnets, inputs, unpacked, apart, wanted)
        except Exception as error:  # whatever the model's own code raises for fewer heads
            return short(error)
        return _difference(got, [reference.outputs for reference in wanted])

    if (why := differs(unpacked)) is None:
        return Found(unpacked, apart, untried)
    candidates = [place for place in places if place not in unpacked]
    if (still := differs(places)) is not None:
        raise ProofError(
            f"cannot attach to {type(model).__name__}: its layers do not give what weights multiplied by masks would "
            f"({still})"
        )
    for place in candidates:
        if (alone := differs(set(places) - {place})) is not None:
            unpacked[place] = alone
    if differs(unpacked) is not None:
        unpacked |= dict.fromkeys((place for place in candidates if place not in unpacked), f"together: {why}")
    return Found(unpacked, apart, untried)


def _check_called(model: nn.Module, groups: list[UnitGroup], calls: Mapping[str, Any], inputs: Inputs) -> None:
    """Refuse a model that reads weights without calling their layers: masks would have no effect.

    A layer that was not called may be one that this batch does not need; then its weight does not matter, either.
    """
    silent = {name: group.place for group in groups for name in group.projections if name not in calls}
    if not silent:
        return
    before = _leaves(model(**inputs))
    nothing = {weight: weight.new_zeros(()).expand(weight.shape) for weight in _weights(model, silent)}
    try:
        with _other_data(nothing):
            after = _leaves(model(**inputs))
    except Exception as error:
        raise ProofError(f"cannot attach to {type(model).__name__}: {short(error)} without weights") from error
    if any(not torch.equal(x, y) for x, y in zip(before, after, strict=True)):
        raise ProofError(
            f"cannot attach to {type(model).__name__}: it reads the weights of {next(iter(silent))!r} without calling "
            "that layer, and would leave masks out"
        )


def _leaves(output: Any) -> list[Tensor]:
    return [leaf.nan_to_num() for leaf in tree_leaves(dict(output)) if isinstance(leaf, Tensor)]


def _key(model: nn.Module, structure: Structure, kinds: tuple[str, ...]) -> str | None:
    """What a result holds for: one class of models with one config, and modules that nobody has exchanged."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    first = next(iter(model.parameters()))
    about = [type(model).__module__, type(model).__qualname__, kinds, str(first.dtype), first.device.type]
    about += [(kind.__module__, kind.__qualname__) for kind in map(type, model.modules())]
    try:
        settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    except TypeError:
        return None
    return repr([about, getattr(config, "_attn_implementation", None), settings, structure])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, everything put back afterwards; random numbers go on as if nothing was."""
    training = [module for module in model.modules() if module.training]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # `with torch.device("meta")` makes weights without memory; what the model makes of its inputs has some.
    device = torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), device:
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _without_zeros(model: nn.Module, groups: list[UnitGroup]) -> AbstractContextManager[None]:
    """Other weights where all are zero, as some begin with, which would let anything pass."""
    weights = _weights(model, dict.fromkeys(name for group in groups for name in group.projections))
    return _other_data({w: torch.randn_like(w) / w.shape[1] ** 0.5 for w in weights if not w.any()})


def _weights(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    modules = [model.get_submodule(name) for name in names]
    return [w for module in modules if not is_wrapped(module) for w in module.parameters(recurse=False) if w.ndim > 1]


@contextmanager
def _other_data(data: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other numbers in parameters, their own put back afterwards."""
    own = {weight: weight.data for weight in data}
    try:
        for weight, other in data.items():
            weight.data = other
        yield
    finally:
        for weight, before in own.items():
            weight.data = before


def _difference(got: Recorded, wanted: list[Recorded]) -> str | None:
    """Where the outputs of a mixed batch are not those of its languages alone."""
    for name, outputs in got.items():
        for language, expected in enumerate(wanted):
            rows = rows_of(language)
            calls = expected.get(name, [])
            if len(calls) != len(outputs):
                return f"{name!r} runs {len(outputs)} times, expected {len(calls)}"
            for output, right in zip(outputs, calls, strict=True):
                if output.shape[0] % EXAMPLES or output.shape[1:] != right.shape[1:]:
                    return f"{name!r} gives the shape {tuple(output.shape)}, for {len(rows)} of it {tuple(right.shape)}"
                mine = output.unflatten(0, (EXAMPLES, -1))[rows].flatten(0, 1)
                if mine.shape != right.shape:
                    return f"{name!r} gives the shape {tuple(mine.shape)}, expected {tuple(right.shape)}"
                error = float((mine - right).abs().max()) if right.numel() else 0.0
                scale = float(right.abs().max()) if right.numel() else 0.0
                if not error <= _TOLERANCE.get(right.dtype, _USUAL) * max(scale, 1e-30):
                    return f"{name!r} gives other numbers (off by {error:.1e} of {scale:.1e})"
    return None
