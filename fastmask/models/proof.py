"""`attach` proves itself: a tiny batch through the layers it is about to give out, against weights times masks.

Packed units need attention code that takes any number of heads, and nothing but products and element-wise functions
between the projections of an FFN. Relative position biases, one number for each head, norms over all heads or neurons
break that, in ways that no list of models can foresee. So it is tried: a few examples of two made-up languages run
through the model with packed layers, and language by language through plain ones whose weights are multiplied by
masks, and the outputs of every attention and FFN are compared. Tokens go to the same experts in both: a router's scores
may differ by a rounding, and its choice then by a whole expert. What differs works unpacked: each unit in its slot,
dead ones zero.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from fastmask.models.contexts import evaluating
from fastmask.models.experts import Stacked
from fastmask.models.layers import Around, put, unit_layers
from fastmask.models.other_libraries import is_wrapped
from fastmask.models.routing import Route, Router
from fastmask.models.structure import Structure, UnitGroup, is_conv1d, kept_of, number_in
from fastmask.subnetworks.subnetworks import Subnetworks

Inputs = Mapping[str, Any]
Recorded = dict[str, list[Tensor]]  # what the projections that read units gave, call by call

_TOKENS, _EXAMPLES = 7, 3
_IDS = [0, 1, 0]  # the languages of the examples: not sorted, and not equally many of each
_ROWS = [[0, 2], [1]]  # the examples of each language

# Of the largest output; many models compute norms in float32, whatever their dtype.
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2}
_USUAL = 1e-4

_known: dict[str, Found] = {}


@dataclass(frozen=True)
class Found:
    """What trying showed, by place (`UnitGroup.place`)."""

    unpacked: Mapping[str, str]  # where units cannot be packed, and why not
    apart: frozenset[str] = frozenset()  # where projections read different inputs: nothing is computed together
    once: frozenset[str] = frozenset()  # where they also run on one example that the whole batch reads
    untried: frozenset[str] = frozenset()  # where nothing was shown, not even that unpacked units are right


class ProofError(ValueError):
    """The model does not compute what its weights times masks would, or cannot be run to see it."""


def try_layers(model: nn.Module, structure: Structure, kinds: tuple[str, ...], example: Inputs | None = None) -> Found:
    """Run a tiny batch through the layers that `attach` would put in, and through weights times masks.

    A `ProofError` says that even unpacked layers give something else than weights times masks, or that the model reads
    weights without calling the layers that hold them.
    """
    groups = [group for kind in kinds for group in structure.groups(kind)]
    places = list(dict.fromkeys(group.place for group in groups))
    if any(parameter.is_meta for parameter in model.parameters()):
        why = "the model has no weights yet that it could be tried with"
        return Found(dict.fromkeys(places, why), untried=frozenset(places))
    key = _key(model, structure, kinds) if example is None else None
    if key is not None and key in _known:
        return _known[key]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # `with torch.device("meta")` makes weights without memory; what the model makes of its inputs has some.
    device = torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), device, evaluating(model):
        # Other weights where all are zero, as some begin with, which would let anything pass.
        weights = _weights(model, dict.fromkeys(name for group in groups for name in group.projections))
        with _other_data({w: torch.randn_like(w) / w.shape[1] ** 0.5 for w in weights if not w.any()}):
            inputs, failure = working_inputs(model, example)
            if inputs is None:
                why = f"no tiny batch could be run ({failure}); give attach(..., example=inputs)"
                found = Found(dict.fromkeys(places, why), untried=frozenset(places))
            else:
                found = _tried(model, groups, places, _Trial(model, structure, _made_up(structure, kinds), inputs))
    if key is not None:
        _known[key] = found
    return found


def _tried(model: nn.Module, groups: list[UnitGroup], places: list[str], trial: _Trial) -> Found:
    wanted = [trial.multiplied(language) for language in (0, 1)]
    calls = wanted[0].inputs
    _check_called(model, groups, calls, trial.inputs)
    once = frozenset(group.place for group in groups if wanted[0].once & group.rows.keys())
    apart = frozenset(group.place for group in groups if len({calls.get(name) for name in group.rows}) > 1) | once
    candidates = list(dict.fromkeys(group.place for group in groups if group.columns[0] in calls))
    why = "the tiny batch does not reach it; give attach(..., example=inputs)"
    unpacked: dict[str, str] = {place: why for place in places if place not in candidates}
    untried = frozenset(unpacked)

    def differs(unpacked: Collection[str]) -> str | None:
        try:
            got = trial.attached(unpacked, apart, once, wanted)
        except Exception as error:  # whatever the model's own code raises for fewer heads
            return short(error)
        return _difference(got, [reference.outputs for reference in wanted])

    if (together := differs(unpacked)) is None:
        return Found(unpacked, apart, once, untried)
    if (still := differs(places)) is not None:
        raise ProofError(
            f"cannot attach to {type(model).__name__}: its layers do not give what weights multiplied by masks would "
            f"({still})"
        )
    for place in candidates:
        if (alone := differs(set(places) - {place})) is not None:
            unpacked[place] = alone
    if differs(unpacked) is not None:
        unpacked |= {place: f"together: {together}" for place in candidates if place not in unpacked}
    return Found(unpacked, apart, once, untried)


def _check_called(model: nn.Module, groups: list[UnitGroup], calls: Mapping[str, Any], inputs: Inputs) -> None:
    """Refuse a model that reads weights without calling their layers: masks would have no effect.

    A layer that was not called may be one that this batch does not need; then its weight does not matter, either.
    """
    silent = [name for group in groups for name in group.projections if name not in calls]
    if not silent:
        return

    def leaves() -> list[Tensor]:
        return [leaf.nan_to_num() for leaf in tree_leaves(dict(model(**inputs))) if isinstance(leaf, Tensor)]

    before = leaves()
    try:
        with _other_data({w: w.new_zeros(()).expand(w.shape) for w in _weights(model, dict.fromkeys(silent))}):
            after = leaves()
    except Exception as error:
        raise ProofError(f"cannot attach to {type(model).__name__}: {short(error)} without weights") from error
    if any(not torch.equal(x, y) for x, y in zip(before, after, strict=True)):
        raise ProofError(
            f"cannot attach to {type(model).__name__}: it reads the weights of {silent[0]!r} without calling that "
            "layer, and would leave masks out"
        )


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
            rows, calls = _ROWS[language], expected.get(name, [])
            if len(calls) != len(outputs):
                return f"{name!r} runs {len(outputs)} times, expected {len(calls)}"
            for output, right in zip(outputs, calls, strict=True):
                whole = output.shape[0] % _EXAMPLES == 0
                mine = output.unflatten(0, (_EXAMPLES, -1))[rows].flatten(0, 1) if whole else output
                if mine.shape != right.shape:
                    return f"{name!r} gives the shape {tuple(mine.shape)}, expected {tuple(right.shape)}"
                error, scale = (float(x.abs().max()) if x.numel() else 0.0 for x in (mine - right, right))
                if not error <= _TOLERANCE.get(right.dtype, _USUAL) * max(scale, 1e-30):
                    return f"{name!r} gives other numbers (off by {error:.1e} of {scale:.1e})"
    return None


# ---- runs of a tiny batch


def _made_up(structure: Structure, kinds: tuple[str, ...]) -> Subnetworks:
    """Two languages whose subnetworks differ in every group that has two units, and in size where it has three."""
    generator = torch.Generator().manual_seed(0)
    keeps: dict[str, Tensor] = {}
    for kind in kinds:
        groups = structure.groups(kind)
        if not groups:
            continue
        keep = torch.zeros(2, len(groups), max(group.units for group in groups), dtype=torch.bool, device="cpu")
        for index, group in enumerate(groups):
            order = torch.randperm(group.units, generator=generator, device="cpu")
            first = max(1, group.units // 2)
            keep[0, index, order[:first]] = True
            keep[1, index, order[first:] if group.units > 1 else order] = True
            if group.units == 4:  # halves would be equally wide
                keep[1, index, order[0]] = True
        keeps[kind] = keep
    return Subnetworks.of(["a", "b"], keeps)


@dataclass(frozen=True)
class _Reference:
    """What a run with weights times masks showed."""

    outputs: Recorded
    inputs: dict[str, int]  # which tensor each projection read first, by its id
    once: frozenset[str]  # which projections also ran on fewer examples than there were: on one
    routing: dict[str, list[tuple[Any, Any]]]  # what modules of experts were given beside tokens, at each call


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


class _Trial:
    """Runs of one batch: the examples of a language with weights times masks, or all with the layers of `attach`."""

    def __init__(self, model: nn.Module, structure: Structure, subnets: Subnetworks, inputs: Inputs) -> None:
        self.model, self.structure, self.subnets, self.inputs = model, structure, subnets, inputs
        groups = [group for _, group, _ in structure.masked(subnets)]
        self.recorded = [group.columns[0] for group in groups]
        self.experts = [group.name for group in groups if group.stacked]

    def multiplied(self, language: int) -> _Reference:
        """A run of the examples of one language, with weights times its masks."""
        layers: dict[str, _Multiplied] = {}
        for _, group, keep in self.structure.masked(self.subnets):
            for name, unit in group.projections.items():
                flags, of_rows = kept_of(keep[language], unit), name in group.rows
                layers[name] = _Multiplied(self.model.get_submodule(name), flags, of_rows, group.stacked)
        inputs = {
            name: value[_ROWS[language]] if isinstance(value, Tensor) and value.shape[:1] == (_EXAMPLES,) else value
            for name, value in self.inputs.items()
        }
        routing: dict[str, list[tuple[Any, Any]]] = {name: [] for name in self.experts}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: routing[name].append((args[1:], kwargs))

        outputs = self._run(layers, inputs, note)
        # Kept until here, so that no two inputs had the same id.
        first = {name: id(layer.inputs[0]) for name, layer in layers.items() if layer.inputs}
        whole = len(_ROWS[language])
        once = {name for name, layer in layers.items() if whole > 1 and any(x.shape[0] == 1 for x in layer.inputs)}
        return _Reference(outputs, first, frozenset(once), routing)

    def attached(
        self, unpacked: Collection[str], apart: Collection[str], once: Collection[str], wanted: list[_Reference]
    ) -> Recorded:
        """A run of all examples, with the layers that `attach` would put in; tokens are routed as in `wanted`."""
        router = Router(self.subnets.languages)
        layers = unit_layers(self.model, self.subnets, router, self.structure, unpacked, apart, once)
        with router.using(Route.of(torch.tensor(_IDS, device="cpu"), 2)):
            return self._run(layers, self.inputs, lambda name: _routed(name, wanted))

    def _run(
        self, layers: Mapping[str, nn.Module | Around], inputs: Inputs, of_experts: Callable[[str], Callable[..., Any]]
    ) -> Recorded:
        """Run the model with other layers, and a hook for each module of experts that sees its arguments."""
        found: Recorded = {}

        def record(name: str) -> Callable[..., None]:
            return lambda module, args, output: found.setdefault(name, []).append(output)

        before = put(self.model, layers)
        handles: list[Any] = []
        try:
            for name in self.recorded:
                handles.append(self.model.get_submodule(name).register_forward_hook(record(name)))
            for name in self.experts:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(of_experts(name), with_kwargs=True))
            self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
            put(self.model, before)
            for layer in layers.values():
                if isinstance(layer, Around):
                    layer.take_off()
        return found


def _routed(name: str, wanted: list[_Reference]) -> Callable[..., Any]:
    calls = itertools.count()

    def joined(own: Any, *of_languages: Any) -> Any:
        if not isinstance(own, Tensor):
            return own
        whole = own.unflatten(0, (_EXAMPLES, -1)).clone()
        for language, of_language in enumerate(of_languages):
            whole[_ROWS[language]] = of_language.unflatten(0, (len(_ROWS[language]), -1))
        return whole.flatten(0, 1)

    def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = next(calls)
        then = [reference.routing[name][call] for reference in wanted]
        rest, kwargs = tree_map(joined, (args[1:], kwargs), *then)
        return (*args[:1], *rest), kwargs

    return route


# ---- a tiny batch for a model that nothing is known of but its config


def working_inputs(model: nn.Module, example: Inputs | None = None) -> tuple[dict[str, Any] | None, str]:
    """Arguments that a plain model runs with, `example` if it is given; or None, and what the model said."""
    forward = inspect.signature(model.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in forward else {}
    failure = "no input that is known"
    for inputs in _tiny_batch(model) if example is None else [dict(example)]:
        try:
            model(**inputs, **without_cache)
        except Exception as error:  # whatever a model's own code raises for an input it does not take
            failure = short(error)
        else:
            return {**inputs, **without_cache}, ""
    return None, failure


def short(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _tiny_batch(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments for a forward pass of three examples that the model may take, most likely ones first."""
    config: Any = getattr(model, "config", None)
    first = next(iter(model.parameters()))
    device, dtype = first.device, first.dtype
    generator, cpu = torch.Generator("cpu").manual_seed(1), torch.device("cpu")  # whatever the standing device is

    def tokens(length: int) -> Tensor:
        get: Any = getattr(model, "get_input_embeddings", None)
        embeddings: Any = None
        with contextlib.suppress(NotImplementedError):  # speech models have none
            embeddings = get() if get is not None else None
        size = getattr(embeddings, "num_embeddings", 0) or _setting(config, "vocab_size") or 16
        ids = torch.randint(min(4, size - 1), size, (_EXAMPLES, length), generator=generator, device=cpu)
        end = _setting(config, "eos_token_id")
        if 0 < end < size:
            ids[:, -1] = end  # classifiers of some models read there
        return ids.to(device)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(_EXAMPLES, *shape, generator=generator, device=cpu).to(device, dtype)

    extra = {"decoder_input_ids": tokens(_TOKENS - 2)} if getattr(config, "is_encoder_decoder", False) else {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_values":
        yield {main: numbers(4000), **extra}
    elif main == "input_features":
        sizes = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
        frames = 2 * _setting(config, "max_source_positions") or 64
        for size in filter(None, (_setting(config, name) for name in sizes)):
            yield {main: numbers(size, frames), **extra}
            yield {main: numbers(64, size), **extra}
    else:
        ids = tokens(_TOKENS)
        yield {"input_ids": ids, **extra}
        yield {"input_ids": ids}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def _setting(config: Any, name: str) -> int:
    """A number of a config, or of one of the configs in it; 0 if there is none."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")] if config else []
    return number_in([config, *inside], [name])
