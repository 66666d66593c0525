"""`attach`, `detach` and `language`: subnetworks on a Hugging Face model, in place and reversible."""

from __future__ import annotations

import copyreg
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmask.linear import checked_forward
from fastmask.live import masked_parameters
from fastmask.models.around import Around
from fastmask.models.building import unit_layers, weight_layers, wrapped_in
from fastmask.models.caches import CacheArguments, packs_heads
from fastmask.models.families import Family
from fastmask.models.places import Places
from fastmask.models.plain import check_model, check_shared, is_own, kind_of, leads_to
from fastmask.models.proof import Found, Inputs, try_layers
from fastmask.models.routing import Router
from fastmask.models.structure import Structure, structure_of
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["attach", "attached", "detach", "freeze_unmasked", "is_attached", "language", "owner_of"]

Model = TypeVar("Model", bound=nn.Module)


UNLOADED = "fastmask.masks_were_not_loaded.use_fastmask_from_pretrained"
"""A name among saved weights that plain `from_pretrained` warns of: without masks the model is another one."""


@dataclass
class Attached:
    """What `attach` did to a model: the masks, the router, and the modules that `detach` puts back."""

    subnets: Subnetworks
    router: Router
    places: Places
    plain_modules: dict[str, nn.Module]
    plain_class: type[nn.Module]
    around: dict[str, Around]  # by the name of the module that each is put around
    structure: Structure
    unpacked: Mapping[str, str]  # places whose units are not packed, and why


def attach(
    model: Model,
    subnets: Subnetworks,
    forward: str = "masked",
    *,
    family: Family | None = None,
    example: Inputs | None = None,
    verify: bool = True,
) -> Model:
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

    With `forward="full"` masks restrict only what may learn: the forward pass and the gradients of activations are
    those of the full network, and each example's gradients reach what its language owns (sparse fine-tuning,
    language-specific neurons). Nothing is packed; a pass without gradients needs no languages. What no mask touches
    (embeddings, norms) trains as ever: `fastmask.freeze_unmasked(model)` stops that. `fastmask.Delta` holds what a
    language has learnt.

    Wrap the model afterwards (`torch.compile`, DistributedDataParallel, `fully_shard`, `Accelerator.prepare`, PEFT with
    adapters on modules without masks). Each forward pass looks whether the masked layers are still where they were put.
    Adapters of PEFT and quantised layers that are there before run as they are, with masks around them: W + BA is
    masked, at the cost of the full network.

    Heads and neurons are found by the names and shapes of modules, not by the model's type. Before anything is changed
    a tiny batch runs through the layers that are about to be put in, and through weights multiplied by masks. Where
    packing units gives something else (relative position biases, norms over all heads), those units are not packed:
    dead ones are zeros in their slots, and cost what is between the projections. A warning says which and why.

    Args:
        model: a Hugging Face model, bare or under a task head (any module, for weight masks).
        subnets: masks for the model's geometry.
        forward: "masked" (each language runs its subnetwork) or "full".
        family: where heads and neurons are, if the model's layout is not a known one (see also `register_family`).
        example: the arguments of a forward pass of three examples, for the proof; made from the config if not given.
        verify: False: take it as proven, and pack everything.

    Raises:
        ValueError: a model of no known layout, a model that has subnetworks attached, masks of another geometry; a
            model or a module to be masked that is wrapped, hooked, parametrized, pruned, quantised or sharded already;
            a model that does not compute what weights times masks would.
        KeyError: `subnets.weights` names a module that does not exist; an unknown `forward`.
    """
    full_forward = checked_forward(forward) == "full"
    if is_attached(model):
        raise ValueError("this model has subnetworks attached already: call fastmask.detach(model) first")
    plain_class = getattr(type(model), "_plain_class", type(model))  # a model may be made by type(attached)(config)
    attached_class = _attached_class(plain_class)
    check_model(model, attached_class.forward)
    router = Router(subnets.languages, full_forward)
    # Everything that can fail comes before the first change to the model.
    kinds = tuple(kind for kind in ("heads", "neurons") if getattr(subnets, kind) is not None)
    structure = structure_of(model, family) if kinds else Structure((), ())
    of_units = unit_layers(model, subnets, router, structure)
    check_shared(model, of_units)
    found = try_layers(model, structure, kinds, example) if kinds and verify else Found({})
    unpacked = {**found.unpacked, **_wrapped(model, structure, kinds)}
    if not full_forward:
        _say(model, unpacked)
    of_units = unit_layers(model, subnets, router, structure, unpacked, found.apart)
    masked = {**of_units, **weight_layers(model, subnets, router, of_units)}
    check_shared(model, masked)
    around = {name: layer for name, layer in masked.items() if isinstance(layer, Around)}
    modules = {name: layer for name, layer in masked.items() if isinstance(layer, nn.Module)}
    plain = {name: model.get_submodule(name) for name in modules}
    if is_own(vars(model).get("forward"), model):  # left behind by hooks that were taken off
        del model.forward
    for name, mask in around.items():
        mask.put(model.get_submodule(name))
    for name, layer in modules.items():
        _replace(model, name, layer)
        # One dictionary for both: loading and sharding replace Parameters, and old ones must not live on in here.
        plain[name]._parameters = layer._parameters
    model.__class__ = attached_class  # type: ignore[assignment]
    model._fastmask = Attached(  # type: ignore[assignment]
        subnets, router, Places(model, modules, around), plain, plain_class, around, structure, unpacked
    )
    return model


def _wrapped(model: nn.Module, structure: Structure, kinds: tuple[str, ...]) -> dict[str, str]:
    """Places where masks are put around adapters or quantised layers."""
    found: dict[str, str] = {}
    for group in (group for kind in kinds for group in structure.groups(kind)):
        if (name := wrapped_in(model, group)) is not None:
            found.setdefault(group.place, f"masks are put around {name!r}, a {kind_of(model.get_submodule(name))}")
    return found


def _say(model: nn.Module, unpacked: Mapping[str, str]) -> None:
    for place, why in unpacked.items():
        between = "attention" if place.startswith("heads") else "what lies between the projections"
        warnings.warn(
            f"{type(model).__name__}: the {place} are not packed ({why}). Results are right, dead units are not "
            f"computed by the projections, and {between} costs what it does in the full network",
            stacklevel=3,
        )


def detach(model: Model) -> Model:
    """Undo `attach`: the plain model again, with the parameters as training left them.

    What others have put in the place of a masked layer stays there.

    Raises:
        ValueError: no subnetworks are attached; or something would be lost that others have since added to the model or
            to a masked layer (adapters, hooks, parametrizations, shards). The model is then as it was.
    """
    state, owner = attached(model), owner_of(model)
    if type(owner) is not _attached_class(state.plain_class):
        raise ValueError(f"cannot detach: the model has become a {kind_of(owner)} since (fully_shard does so)")
    for name, (parent, child, layer) in state.places.removable().items():
        module = state.plain_modules[name]
        if isinstance(module, nn.Linear):
            # Embeddings that were resized have put another weight into a tied output layer.
            module.out_features, module.in_features = module.weight.shape
        parent[child] = module.train(layer.training)
    for mask in state.around.values():
        mask.take_off()
    owner.__class__ = state.plain_class
    del owner._fastmask
    return model


def freeze_unmasked(model: Model) -> Model:
    """Let only what masks touch learn: every parameter without a mask gets `requires_grad=False`; returns the model.

    Masks touch the weights of masked layers, and their biases below row masks (of query, key, value and the first
    projection of an FFN). Call it on the whole model, before the optimiser is made; a head that is to be trained for
    the task gets its `requires_grad_()` back afterwards.

    Raises:
        ValueError: nothing in the model has a mask.
    """
    masked = masked_parameters(model)
    if not masked:
        raise ValueError(f"nothing in this {type(model).__name__} has a mask: call fastmask.attach first")
    for parameter in model.parameters():
        if parameter not in masked:
            parameter.requires_grad_(False)
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
    """The module that `attach` changed, below torch.compile, DistributedDataParallel or PEFT; `model` if none was."""
    while "_fastmask" not in vars(model):  # not hasattr: wrappers pass questions on to what they wrap
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


# ---- the forward pass


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _attached_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of a model's class, under the same name, whose forward also takes `language_ids`.

    A subclass rather than a function on the instance: copies of the model then run their own forward, and
    `isinstance`, `save_pretrained` and `inspect.signature(model.forward)` work as before.
    """
    if plain in _CLASSES:
        return _CLASSES[plain]

    def forward(self: Any, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        state: Attached | None = getattr(self, "_fastmask", None)
        if state is None:  # detached; `Accelerator.prepare`, for one, keeps a forward on the instance
            if language_ids is not None:
                raise ValueError(f"no subnetworks are attached to this {plain.__name__}, but language_ids was given")
            return plain.forward(self, *args, **kwargs)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel copies modules but not what joins them, and cannot run subnetworks: use "
                "torch.nn.parallel.DistributedDataParallel (start with torchrun or `accelerate launch`)"
            )
        state.places.check()
        route = state.router.resolve(language_ids)
        cache = caching.cache(args, kwargs)
        if state.router.full_forward:
            pass  # keys and values are those of all heads
        elif cache is None and not caching.asks_for_one(args, kwargs):
            args, kwargs = caching.without(args, kwargs)
        elif state.subnets.heads is not None:
            one_stack = state.structure.one_stack and not state.unpacked
            route.packs_heads = one_stack and packs_heads(cache, state.subnets.heads, route.present)
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

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward" and "_fastmask" in vars(self):
            if is_own(value, self, plain):
                # Kept from before attach: the model's own forward, which now takes language_ids.
                value = forward.__get__(self)
            elif leads_to(value, plain.forward):
                raise ValueError(
                    "this forward was wrapped before attach, and would drop language_ids: wrap model.forward"
                )
        plain.__setattr__(self, name, value)

    def reduce(self: Any, protocol: Any) -> Any:
        how = plain.__reduce_ex__(self, protocol)
        if type(self) is not attached_class or how[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return how
        return (_empty, (plain,), *how[2:])

    kind: Any = plain

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if "_fastmask" not in vars(self):
            kind.save_pretrained(self, save_directory, *args, **kwargs)
        else:
            from fastmask.models.saving import save_pretrained as save  # which imports this module

            names = list(inspect.signature(kind.save_pretrained).parameters)[2:]
            save(self, save_directory, **dict(zip(names, args, strict=False)), **kwargs)

    def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + UNLOADED, None)
        plain._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    namespace = {
        "forward": forward,
        "_load_from_state_dict": load_from_state_dict,
        "__setattr__": set_attribute,
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        "_plain_class": plain,
    }
    if hasattr(plain, "save_pretrained"):  # a Hugging Face model
        save_pretrained.__doc__ = kind.save_pretrained.__doc__
        namespace["save_pretrained"] = save_pretrained
    attached_class = _CLASSES.setdefault(plain, type(plain.__name__, (plain,), namespace))
    return attached_class


def _empty(plain: type[nn.Module]) -> nn.Module:
    """What copies and pickles of attached models begin with: their class has no name that it could be found under."""
    kind = _attached_class(plain)
    return kind.__new__(kind)
