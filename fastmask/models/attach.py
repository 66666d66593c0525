"""`attach`, `detach`, `language`, `set_language`: subnetworks on a Hugging Face model, in place and reversible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.models.building import unit_layers, weight_layers
from fastmask.models.entry import INNER, OUTER, attached_class, inner_models, plain_class_of
from fastmask.models.families import layer_parts
from fastmask.models.language_arguments import id_of
from fastmask.models.layers import AttachedLinear
from fastmask.models.offloading import follow_class, move_hook, unhook_if_alone
from fastmask.models.places import Places
from fastmask.models.plain import check_model, check_shared, is_own, kind_of
from fastmask.models.routing import Router
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["attach", "attached", "detach", "is_attached", "language", "owner_of", "set_language", "set_subnetwork"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Attached:
    """What `attach` did to a model: the masks, the router, and the modules that `detach` puts back."""

    subnets: Subnetworks
    router: Router
    places: Places
    plain_modules: dict[str, nn.Module]


def attach(model: Model, subnets: Subnetworks) -> Model:
    """Give each language of `subnets` its subnetwork of `model`; the model is changed in place and returned.

    Parameters, state dict keys and `save_pretrained` stay as they were. The forward pass takes one more argument, which
    is one of three: `language="fi"` for the whole batch, `languages=["fi", "de", None]`, or `language_ids`, int64
    [batch] (int32 and lists of ints, too): positions in `subnets.languages`, -1 for the full network, as is None among
    names. They are in its signature, so that `transformers.Trainer` keeps the columns. `generate`, and models inside
    that are called by themselves (`model.base_model(...)`), take them, too. Where a model takes [batch, choices,
    tokens], ids are [batch], or one for each choice; ids [batch, tokens] are those of single tokens, for packed rows of
    several languages. Without any of these, `language(...)` and then `set_language` say it.
    Batches may mix languages; they run fastest sorted by language.
    Dead heads and neurons are not computed, forward or backward; attention probabilities that the model returns are
    those of the live heads, in order. Several threads, and tasks of an event loop, may run the model at the same time,
    each with languages of its own.

    A cache of keys and values may be continued under other languages than it was filled under, the full network
    included, and without some of its rows. No cache is made unless the call gives one or says `use_cache=True`, as
    `generate` does; the attention of a call with a cache computes dead heads as zeros, unless the cache was new and the
    batch of one language.

    Wrap the model afterwards (`torch.compile`, DistributedDataParallel, `fully_shard`, `Accelerator.prepare`, PEFT with
    adapters on modules without masks); hooks of accelerate (`device_map`, offload) may also come before. Each forward
    pass looks whether the masked layers are still where they were put.

    Args:
        model: a Hugging Face model of a supported family, bare or under a task head (any module, for weight masks).
        subnets: masks for the model's geometry.

    Raises:
        ValueError: an unsupported model, a model that has subnetworks attached, masks of another geometry; a model or
            a module to be masked that is wrapped, hooked (but by accelerate), parametrized, pruned, quantised, sharded.
        KeyError: `subnets.weights` names a module that does not exist.
    """
    if is_attached(model):
        raise ValueError("this model has subnetworks attached already: call fastmask.detach(model) first")
    check_model(model)
    router = Router(subnets.languages)
    # Everything that can fail comes before the first change to the model.
    masked = {**unit_layers(model, subnets, router), **weight_layers(model, subnets, router)}
    check_shared(model, masked)
    plain = {name: model.get_submodule(name) for name in masked}
    inner = list(inner_models(model, masked))
    for name, layer in masked.items():
        _replace(model, name, layer)
        # One dictionary for both: loading and sharding replace Parameters, and old ones must not live on in here.
        plain[name]._parameters = layer._parameters
        move_hook(plain[name], layer)
    state = Attached(subnets, router, Places(model, masked), plain)
    models: list[nn.Module] = [model, *inner]
    for module in models:
        if is_own(vars(module).get("forward"), module):  # left behind by hooks that were taken off
            del module.forward
        module.__class__ = attached_class(plain_class_of(module))
        follow_class(module)
        setattr(module, OUTER if module is model else INNER, state)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the plain model again, with the parameters as training left them.

    What others have put in the place of a masked layer stays there.

    Raises:
        ValueError: no subnetworks are attached; or something would be lost that others have since added to the model or
            to a masked layer (adapters, hooks, parametrizations, shards). The model is then as it was.
    """
    state, owner = attached(model), owner_of(model)
    if OUTER not in vars(owner):
        raise ValueError(f"cannot detach this {type(owner).__name__}: it is inside of the model that is to be detached")
    models = [owner, *(module for module in owner.modules() if INNER in vars(module))]
    for module in models:
        if type(module) is not attached_class(plain_class_of(module)):
            raise ValueError(f"cannot detach: the model has become a {kind_of(module)} since (fully_shard does so)")
    for name, (parent, child, layer) in state.places.removable(state.plain_modules).items():
        module = state.plain_modules[name]
        if isinstance(module, nn.Linear):
            # Embeddings that were resized have put another weight into a tied output layer.
            module.out_features, module.in_features = module.weight.shape
        unhook_if_alone(module, layer)
        parent[child] = module.train(layer.training)
    for module in models:
        module.__class__ = plain_class_of(module)
        follow_class(module)
        delattr(module, OUTER if module is owner else INNER)
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
    router = attached(model).router
    with router.default.entered(id_of(name, router.languages)):
        yield


def set_language(model: nn.Module, name: str | None = ...) -> None:  # type: ignore[assignment]
    """Set the standing language of a model: what calls run in that say none; None is the full network.

    `fastmask.set_language(model)`, without a name, takes it off. It is of the model and not of a context: every thread
    and task sees it, copies and pickles keep it, `detach` forgets it. `with language(...)` and the languages of a call
    come before it. Gradient checkpointing recomputes under the language of the forward pass, whatever was set since.

    Raises:
        KeyError: not a language of the attached subnetworks; the message names the nearest ones.
    """
    router = attached(model).router
    router.standing = None if name is ... else id_of(name, router.languages)


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
    return _state_of(owner_of(model)) is not None


def attached(model: nn.Module) -> Attached:
    """The state that `attach` left on a model."""
    state = _state_of(owner_of(model))
    if state is None:
        raise ValueError(f"no subnetworks are attached to this {type(model).__name__}: call fastmask.attach first")
    return state


def _state_of(module: nn.Module) -> Attached | None:
    found: Attached | None = vars(module).get(OUTER) or vars(module).get(INNER)
    return found


def owner_of(model: nn.Module) -> nn.Module:
    """The module that `attach` changed, below torch.compile, DistributedDataParallel or PEFT; `model` if none was."""
    while OUTER not in vars(model):  # not hasattr: wrappers pass questions on to what they wrap
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and callable(unwrap := getattr(model, "get_base_model", None)):
            inner = unwrap()
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
