"""`attach`, `detach`, `language`, `set_language`: subnetworks on a Hugging Face model, in place and reversible."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar

from torch import Tensor, nn

from fastmask.linear import MaskedLinear, checked_forward
from fastmask.live import masked_parameters
from fastmask.masks import FULL, checked_id
from fastmask.models.calls import INNER, ORIGIN, OUTER, attached_class, inner_models, plain_class_of, state_of
from fastmask.models.experts import AttachedExperts
from fastmask.models.families import Family
from fastmask.models.languages import id_of
from fastmask.models.layers import Around, put, unit_layers, weight_layers, wrapped_in
from fastmask.models.other_libraries import (
    Places,
    change_class,
    check_model,
    check_shared,
    is_own,
    kind_of,
    move_hook,
    unhook_if_alone,
)
from fastmask.models.proof import Found, Inputs, try_layers
from fastmask.models.routing import Router
from fastmask.models.structure import Structure, structure_of
from fastmask.subnetworks.subnetworks import Subnetworks

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Attached:
    """What `attach` did to a model: the masks, the router, and the modules that `detach` puts back."""

    subnets: Subnetworks
    router: Router
    places: Places
    plain_modules: dict[str, nn.Module]
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

    Parameters, state dict keys and `save_pretrained` stay as they were. The forward pass takes one more argument, which
    is one of three: `language="fi"` for the whole batch, `languages=["fi", "de", None]`, or `language_ids`, int64
    [batch] (int32, lists of ints and arrays, too): positions in `subnets.languages`, -1 for the full network, as is
    None among names. They are in its signature, so that `transformers.Trainer` keeps the columns. `generate`, and
    models inside that are called by themselves (`model.base_model(...)`), take them, too, but for `language` where it
    is an argument of the model's own `generate` (Whisper). Where a model takes [batch, choices, tokens], ids are
    [batch], or one for each choice; ids [batch, tokens] are those of single tokens, for packed rows of several
    languages. Without any of these, `language(...)` and then `set_language` say it.
    Batches may mix languages; they run fastest sorted by language.
    Dead heads and neurons are not computed, forward or backward, but in mixed batches on a CPU that are multiplied
    faster whole; attention probabilities that the model returns are those of the live heads, in order. Several threads,
    and tasks of an event loop, may run the model at the same time, each with languages of its own.

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
    adapters on modules without masks); hooks of accelerate (`device_map`, offload) may also come before. Each forward
    pass looks whether the masked layers are still where they were put. Adapters of PEFT and quantised layers that are
    there before run as they are, with masks around them: W + BA is masked, at the cost of the full network.

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
            model or a module to be masked that is wrapped, hooked (but by accelerate), parametrized, pruned or sharded;
            a model that does not compute what weights times masks would.
        KeyError: `subnets.weights` names a module that does not exist; an unknown `forward`.
    """
    full_forward = checked_forward(forward) == "full"
    if is_attached(model):
        raise ValueError("this model has subnetworks attached already: call fastmask.detach(model) first")
    check_model(model)
    router = Router(subnets.languages, full_forward)
    # Everything that can fail comes before the first change to the model.
    kinds = tuple(subnets.units)
    structure = structure_of(model, family) if kinds else Structure((), ())
    of_units = unit_layers(model, subnets, router, structure)
    check_shared(model, of_units)
    found = try_layers(model, structure, kinds, example) if kinds and verify else Found({})
    if full_forward and found.once:
        raise ValueError(
            f'forward="full" lets each language learn from its own examples, but the {min(found.once)} also run on '
            "something that all examples of a batch share (embeddings of relative positions, say): mask neurons only"
        )
    wrapped: dict[str, str] = {}
    for group in (group for kind in kinds for group in structure.groups(kind)):
        if (name := wrapped_in(model, group)) is not None:
            wrapped.setdefault(group.place, f"masks are put around {name!r}, a {kind_of(model.get_submodule(name))}")
    unpacked = {**found.unpacked, **wrapped}
    if not full_forward:
        _say(model, structure, unpacked, found.untried)
    if unpacked or found.apart:
        of_units = unit_layers(model, subnets, router, structure, unpacked, found.apart, found.once)
    masked = {**of_units, **weight_layers(model, subnets, router, of_units)}
    check_shared(model, masked)
    around = {name: layer for name, layer in masked.items() if isinstance(layer, Around)}
    modules = {name: layer for name, layer in masked.items() if isinstance(layer, nn.Module)}
    plain = {name: model.get_submodule(name) for name in modules}
    inner = list(inner_models(model, masked))
    put(model, masked)
    for name, layer in modules.items():
        # One dictionary for both: loading and sharding replace Parameters, and old ones must not live on in here.
        plain[name]._parameters = layer._parameters
        move_hook(plain[name], layer)
    places = Places(model, modules, around)
    state = Attached(subnets, router, places, plain, around, structure, unpacked)
    models: list[nn.Module] = [model, *inner]
    for module in models:
        if is_own(vars(module).get("forward"), module):  # left behind by hooks that were taken off
            del module.forward
        change_class(module, attached_class(plain_class_of(module)))
        setattr(module, OUTER if module is model else INNER, state)
    return model


def _say(model: nn.Module, structure: Structure, unpacked: Mapping[str, str], untried: Collection[str]) -> None:
    of_experts = {group.place for group in structure.ffns if group.stacked}
    for place, why in unpacked.items():
        between = "attention" if place.startswith("heads") else "what lies between the projections"
        costs = f"dead units are not computed by the projections, and {between} costs what it does in the full network"
        if place in of_experts:
            costs = "and experts cost what they do in the full network"
        right = "Whether results are right was not tried" if place in untried else "Results are right"
        warnings.warn(f"{type(model).__name__}: the {place} are not packed ({why}). {right}, {costs}", stacklevel=3)


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
    for mask in state.around.values():
        mask.take_off()
    for module in models:
        change_class(module, plain_class_of(module))
        delattr(module, OUTER if module is owner else INNER)
    state.router.close()
    vars(owner).pop(ORIGIN, None)
    return model


def freeze_unmasked(model: Model) -> Model:
    """Let only what masks touch learn: every parameter without a mask gets `requires_grad=False`; returns the model.

    Masks touch the weights of masked layers, and their biases below row masks (of query, key, value and the first
    projection of an FFN), and all of an adapter that they are put around. Call it on the whole model, before the
    optimizer is made; a head that is to be trained for the task gets its `requires_grad_()` back afterwards.

    Raises:
        ValueError: nothing in the model has a mask.
    """
    masked: set[Tensor] = set(masked_parameters(model))
    if (state := state_of(owner_of(model))) is not None:
        masked.update(*(owner_of(model).get_submodule(name).parameters() for name in state.around))
    for layer in model.modules():
        if isinstance(layer, AttachedExperts):
            masked.update(getattr(layer, stacked.name) for stacked in layer.stacked)
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
    router = attached(model).router
    with router.default.entered(id_of(name, router.languages)):
        yield


def set_language(model: nn.Module, name: str | EllipsisType | None = ...) -> None:
    """Set the standing language of a model: what calls run in that say none; None is the full network.

    `fastmask.set_language(model)`, without a name, takes it off. It is of the model and not of a context: every thread
    and task sees it, copies and pickles keep it, `detach` forgets it. `with language(...)` and the languages of a call
    come before it. Gradient checkpointing recomputes under the language of the forward pass, whatever was set since.

    Raises:
        KeyError: not a language of the attached subnetworks; the message names the nearest ones.
    """
    router = attached(model).router
    router.standing = None if name is ... else id_of(name, router.languages)


def is_attached(model: nn.Module) -> bool:
    """Whether subnetworks are attached to a model (also below DistributedDataParallel or torch.compile)."""
    return state_of(owner_of(model)) is not None


def attached(model: nn.Module) -> Attached:
    """The state that `attach` left on a model."""
    state = state_of(owner_of(model))
    if state is None:
        raise ValueError(f"no subnetworks are attached to this {type(model).__name__}: call fastmask.attach first")
    return state


def owners_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that subnetworks are attached to: it, or parts of it."""
    return [module for module in model.modules() if OUTER in vars(module)]


def number_of(model: nn.Module, language: str | int | None) -> int:
    """The id of a language in all masks of a model or of its parts; `FULL` for None, and for any where none has masks.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: an id out of range, a name where masked layers have none, or parts of different languages.
    """
    names = {state.subnets.languages for part in model.modules() if (state := state_of(part)) is not None}
    if len(names) > 1:
        raise ValueError("parts of the model have subnetworks of different languages attached: expected the same")
    counts = {layer.mask.n_languages for layer in model.modules() if isinstance(layer, MaskedLinear)}
    if language is None or not (names or counts):
        return FULL  # without masks a language is only a name
    if not isinstance(language, str):
        return checked_id(language, min([*counts, *map(len, names)]))
    if not names:
        raise ValueError(
            f"language {language!r}: the model has masked layers, but no subnetworks with names: give a number"
        )
    return id_of(language, *names)


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
