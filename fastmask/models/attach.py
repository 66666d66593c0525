"""`attach`, `detach` and `language`: subnetworks on a Hugging Face model, in place and reversible."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.masks import Mask
from fastmask.models.caches import CacheArguments, packs_heads
from fastmask.models.families import family_of, layer_parts
from fastmask.models.layers import AttachedLinear, Siblings
from fastmask.models.routing import Router
from fastmask.subnetworks.geometry import Geometry
from fastmask.subnetworks.subnetworks import Subnetworks
from fastmask.torch_path.activations import NONE, name_of

__all__ = ["attach", "attached", "detach", "is_attached", "language", "owner_of", "set_subnetwork"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Attached:
    """What `attach` did to a model: the masks, the router, and the modules that `detach` puts back."""

    subnets: Subnetworks
    router: Router
    plain_modules: dict[str, nn.Module]
    plain_class: type[nn.Module]


def attach(model: Model, subnets: Subnetworks) -> Model:
    """Give each language of `subnets` its subnetwork of `model`; the model is changed in place and returned.

    Parameters, state dict keys and `save_pretrained` stay as they were. The forward pass takes one more argument,
    `language_ids` int64 [batch] (positions in `subnets.languages`, -1 for the full network), shown in its signature so
    that `transformers.Trainer` keeps the column. Batches may mix languages; they run fastest sorted by language.
    Dead heads and neurons are not computed, forward or backward; attention probabilities that the model returns are
    those of the live heads, in order. Several threads, and tasks of an event loop, may run the model at the same time,
    each with languages of its own.

    A cache of keys and values may be continued under other languages than it was filled under, the full network
    included, and without some of its rows. No cache is made unless the call gives one or says `use_cache=True`, as
    `generate` does; the attention of a call with a cache computes dead heads as zeros, unless the cache was new and the
    batch of one language.

    Args:
        model: a Hugging Face model of a supported family, bare or under a task head (any module, for weight masks).
        subnets: masks for the model's geometry.

    Raises:
        ValueError: an unsupported model, a model that has subnetworks attached, masks of another geometry.
        KeyError: `subnets.weights` names a module that does not exist.
    """
    if is_attached(model):
        raise ValueError("this model has subnetworks attached already: call fastmask.detach(model) first")
    router = Router(subnets.languages)
    # Everything that can fail comes before the first change to the model.
    masked = {**_unit_layers(model, subnets, router), **_weight_layers(model, subnets, router)}
    plain = {name: model.get_submodule(name) for name in masked}
    state = Attached(subnets, router, plain, type(model))
    for name, layer in masked.items():
        _replace(model, name, layer)
    model.__class__ = _attached_class(type(model))  # type: ignore[assignment]
    model._fastmask = state  # type: ignore[assignment]
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the plain model again, with the parameters as training left them."""
    state = attached(model)
    owner = owner_of(model)
    for name, module in state.plain_modules.items():
        replacement = owner.get_submodule(name)
        if isinstance(module, nn.Linear):
            # Loading with assign=True or moving a model can replace the Parameter objects.
            module.weight, module.bias = replacement.weight, replacement.bias  # type: ignore[assignment]
        _replace(owner, name, module.train(replacement.training))
    owner.__class__ = state.plain_class
    del owner._fastmask
    return model


@contextmanager
def language(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run every forward pass inside with one language for the whole batch; None is the full network.

    It holds in the context that enters it, as `contextvars` has it: for one asyncio task and those that it starts
    inside, for one thread (`asyncio.to_thread` takes it along, a thread pool does not). In a generator it holds while
    the generator runs, not for whoever takes its items meanwhile; in one that `contextlib` or pytest run as a context
    manager, for what runs inside of that. Masked layers that are reached around the model's own forward follow it, too.

    Gradient checkpointing recomputes under the language of the forward pass. For that, `torch.utils.checkpoint` (or a
    checkpoint written as an `autograd.Function`) may be entered inside, or enter it itself. Where neither tells, the
    backward pass ends with an error: what was opened around `backward()` is not for what is recomputed.

    Not detected: a generator that lets something else hold what it opened (an `ExitStack` that a function returned).

    Raises:
        KeyError: not a language of the attached subnetworks; the message names the nearest ones.
        RuntimeError: on leaving it, if another one of the same model was entered later and is still open.
    """
    state = attached(model)
    with state.router.default.entered(-1 if name is None else state.subnets.index(name)):
        yield


def set_subnetwork(model: nn.Module, language: str, heads: Tensor | None = None, neurons: Tensor | None = None) -> None:
    """Give one language of an attached model another subnetwork; those of the other languages stay as they are.

    Only layers where the language's units really change get new masks. `attached(model).subnets` becomes a new object;
    whoever held the old one still has the old masks. Call it between a backward pass and the next forward pass (one
    that was begun before ends with the masks it began with, unless gradient checkpointing recomputes it). A compiled
    model may compile again.

    Args:
        model: a model with subnetworks attached.
        language: one of their languages.
        heads: bool [layers, heads], or None to leave them.
        neurons: bool [layers, ffn], or None to leave them.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: a kind of unit that is not masked, another shape or dtype, or a layer left without a live unit.
    """
    state, owner = attached(model), owner_of(model)
    row = state.subnets.index(language)
    given = {what: keep for what, keep in (("heads", heads), ("neurons", neurons)) if keep is not None}
    if not given:
        raise ValueError("nothing to set: give heads, neurons or both")
    for what, keep in given.items():
        _check_one(what, keep, getattr(state.subnets, what), language)
    # Everything that can fail comes before the first change to the model.
    changed: list[tuple[AttachedLinear, Mask]] = []
    for index, parts in enumerate(layer_parts(owner)):
        for what, keep in given.items():
            if torch.equal(keep[index].cpu(), getattr(state.subnets, what)[row, index].cpu()):
                continue
            units = {**parts.heads_rows, parts.heads_columns[0]: parts.heads_columns[1]}
            if what == "neurons":
                units = dict.fromkeys((*parts.neurons_rows, parts.neurons_columns), 1)
            for module_name, unit in units.items():
                layer = owner.get_submodule(module_name)
                assert isinstance(layer, AttachedLinear)
                changed.append((layer, layer.mask.replaced(row, keep[index].repeat_interleave(unit))))
    wide = {what: getattr(state.subnets, what) for what in ("heads", "neurons")}
    for what, keep in given.items():
        wide[what] = wide[what].clone()
        wide[what][row] = keep
    subnets = Subnetworks(state.subnets.languages, weights=state.subnets.weights, **wide)
    counts = [mask.live_counts() for _, mask in changed]
    for (layer, mask), live in zip(changed, counts, strict=True):
        layer.mask, layer._live_counts = mask, live
    state.subnets = subnets


def _check_one(what: str, keep: Tensor, before: Tensor | None, name: str) -> None:
    """Refuse what cannot be one language's units."""
    if before is None:
        raise ValueError(f"the attached subnetworks do not mask {what}: only those that do can be changed")
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != before.shape[1:]:
        given = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"expected {what} of {name!r} as a bool tensor {tuple(before.shape[1:])}, given {given}")
    dead = (~keep.any(1)).nonzero().flatten().tolist()
    if dead:
        raise ValueError(f"this would leave {name!r} without live {what} in layer {dead[0]}: keep at least one")


def is_attached(model: nn.Module) -> bool:
    """Whether subnetworks are attached to a model (also below DistributedDataParallel or torch.compile)."""
    return hasattr(owner_of(model), "_fastmask")


def attached(model: nn.Module) -> Attached:
    """The state that `attach` left on a model."""
    state: Attached | None = getattr(owner_of(model), "_fastmask", None)
    if state is None:
        raise ValueError(f"no subnetworks are attached to this {type(model).__name__}: call fastmask.attach first")
    return state


def owner_of(model: nn.Module) -> nn.Module:
    """The module that `attach` changed, below DistributedDataParallel or torch.compile; `model` itself if none was."""
    while "_fastmask" not in vars(model):  # not hasattr: a compiled module passes questions on to the one it wraps
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


# ---- building the masked layers


def _unit_layers(model: nn.Module, subnets: Subnetworks, router: Router) -> dict[str, nn.Module]:
    """The packed layers of heads and neurons, by module name, and identities for activations that they take over."""
    if subnets.heads is None and subnets.neurons is None:
        return {}
    family_of(model)  # an unsupported model gets an error that names the supported ones, not a missing attribute
    _check_geometry(model, subnets)
    layers: dict[str, nn.Module] = {}

    def add(name: str, keep: Tensor, unit: int, side: str, of_heads: bool = False) -> AttachedLinear:
        linear = _linear(model, name)
        wide = keep.repeat_interleave(unit, 1)
        build, other = (Mask.rows, linear.in_features) if side == "rows" else (Mask.columns, linear.out_features)
        options = {"router": router, "packed_unit": unit, "of_heads": of_heads}
        layer = AttachedLinear.from_linear(linear, build(wide, other), **options)
        layers[name] = layer
        return layer

    for index, parts in enumerate(layer_parts(model)):
        if subnets.heads is not None:
            keep = subnets.heads[:, index]
            _join([add(name, keep, unit, "rows", of_heads=True) for name, unit in parts.heads_rows.items()])
            add(parts.heads_columns[0], keep, parts.heads_columns[1], "columns", of_heads=True)
        if subnets.neurons is not None:
            _join([add(name, subnets.neurons[:, index], 1, "rows") for name in parts.neurons_rows])
            down = add(parts.neurons_columns, subnets.neurons[:, index], 1, "columns")
            if parts.activation is not None:
                down.activation = name_of(model.get_submodule(parts.activation))
                if down.activation != NONE:
                    layers[parts.activation] = nn.Identity()
    return layers


def _join(layers: list[AttachedLinear]) -> None:
    """Let layers that read the same input be computed together."""
    with_bias = {layer.bias is not None for layer in layers}
    if len(layers) > 1 and len(with_bias) == 1:
        siblings = Siblings(layers)
        for layer in layers:
            layer.siblings = siblings


def _weight_layers(model: nn.Module, subnets: Subnetworks, router: Router) -> dict[str, AttachedLinear]:
    """The layers with a mask over single weights, by module name."""
    layers = {}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, keep in (subnets.weights or {}).items():
        if name not in linears:
            raise unknown("linear layer", name, linears)
        linear = _linear(model, name)
        expected = (len(subnets.languages), linear.out_features, linear.in_features)
        if tuple(keep.shape) != expected:
            raise ValueError(f"the mask of {name!r} has shape {tuple(keep.shape)}, expected {expected}")
        layers[name] = AttachedLinear.from_linear(linear, Mask.weights(keep), router=router, packed_unit=None)
    if subnets.heads is not None or subnets.neurons is not None:
        taken = [name for name in layers if name in _unit_names(model, subnets)]
        if taken:
            raise ValueError(f"{taken[0]!r} has a mask over weights and one over heads or neurons: give one of the two")
    return layers


def _unit_names(model: nn.Module, subnets: Subnetworks) -> set[str]:
    names: set[str] = set()
    for parts in layer_parts(model):
        if subnets.heads is not None:
            names |= {*parts.heads_rows, parts.heads_columns[0]}
        if subnets.neurons is not None:
            names |= {*parts.neurons_rows, parts.neurons_columns}
    return names


def _check_geometry(model: nn.Module, subnets: Subnetworks) -> None:
    geometry = Geometry.of(model.config)
    for what, keep, size in (
        ("heads", subnets.heads, geometry.heads),
        ("neurons", subnets.neurons, geometry.neurons),
    ):
        if keep is not None and tuple(keep.shape[1:]) != (geometry.layers, size):
            raise ValueError(
                f"the masks are for {keep.shape[1]} layers of {keep.shape[2]} {what}, "
                f"this {type(model).__name__} has {geometry.layers} layers of {size} {what}"
            )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"expected a plain nn.Linear at {name!r}, found {type(module).__name__}: attach before wrapping or "
            "quantising layers"
        )
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ---- the forward pass


def _attached_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the model's class, under the same name, whose forward also takes `language_ids`.

    A subclass rather than a function on the instance: copies of the model then run their own forward, and
    `isinstance`, `save_pretrained` and `inspect.signature(model.forward)` work as before.
    """

    def forward(self: Any, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel copies modules but not what joins them, and cannot run subnetworks: use "
                "torch.nn.parallel.DistributedDataParallel (start with torchrun or `accelerate launch`)"
            )
        state: Attached = self._fastmask
        route = state.router.resolve(language_ids)
        cache = caching.cache(args, kwargs)
        if cache is None and not caching.asks_for_one(args, kwargs):
            args, kwargs = caching.without(args, kwargs)
        elif state.subnets.heads is not None:
            route.packs_heads = packs_heads(cache, state.subnets.heads, route.present)
        with state.router.using(route):
            return plain.forward(self, *args, **kwargs)

    signature = inspect.signature(plain.forward)
    caching = CacheArguments(signature)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter("language_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
    position = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:position], extra, *parameters[position:]]
    )
    forward.__doc__ = plain.forward.__doc__
    namespace = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), namespace)
