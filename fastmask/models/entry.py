"""The class of an attached model, whose calls also take languages, and set the route of what runs inside."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fastmask.models.caches import CacheArguments, packs_heads
from fastmask.models.language_arguments import LanguageArguments, ids_of, leading_sizes

if TYPE_CHECKING:
    from fastmask.models.attach import Attached

__all__ = ["INNER", "OUTER", "UNLOADED", "attached_class", "inner_models", "plain_class_of"]

OUTER, INNER = "_fastmask", "_fastmask_of_outer"  # where the state is kept: on the model, and on models inside of it

UNLOADED = "fastmask.masks_were_not_loaded.use_fastmask_from_pretrained"
"""A name among saved weights that plain `from_pretrained` warns of: without masks the model is another one."""

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def attached_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of a model's class, under the same name, that takes languages when it is called.

    A subclass rather than functions on the instance, or hooks: copies of the model run their own, the route ends with
    the call whatever ends it, and `isinstance`, `save_pretrained` and `inspect.signature(model.forward)` go on working.
    The languages are taken at `__call__`, so that they reach the layers whatever forward others have put on the
    instance; a forward that is called by itself takes them, too.
    """
    if plain in _CLASSES:
        return _CLASSES[plain]
    signature = inspect.signature(plain.forward)
    arguments, caching, sizes = LanguageArguments(signature), CacheArguments(signature), leading_sizes(signature)

    def run(self: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: Attached | None = getattr(self, OUTER, None)
        of_outer: Attached | None = getattr(self, INNER, None) if state is None else None
        given = arguments.taken(kwargs)
        if of_outer is not None and not given:
            return function(self, *args, **kwargs)  # in the pass of the outer model, or as layers find it by themselves
        state = state or of_outer
        if state is None:  # detached; `Accelerator.prepare`, for one, keeps a forward on the instance
            if given:
                raise ValueError(
                    f"no subnetworks are attached to this {plain.__name__}, but {next(iter(given))} was given"
                )
            return function(self, *args, **kwargs)
        route, by_itself = state.router.running.route, function is plain.forward
        if by_itself and not given and route is not None and route.awaits_forward:
            route.awaits_forward = False
            return function(self, *args, **kwargs)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel copies modules but not what joins them, and cannot run subnetworks: use "
                "torch.nn.parallel.DistributedDataParallel (start with torchrun or `accelerate launch`)"
            )
        state.places.check()
        ids = ids_of(given, state.router.languages)
        route = state.router.resolve(ids, sizes(args, kwargs), given.get("language_counts"))
        cache = caching.cache(args, kwargs)
        if state.router.full_forward:
            pass  # keys and values are those of all heads
        elif cache is None and not caching.asks_for_one(args, kwargs):
            args, kwargs = caching.without(args, kwargs)
        elif state.subnets.heads is not None:
            one_stack = state.structure.one_stack and not state.unpacked
            route.packs_heads = one_stack and packs_heads(cache, state.subnets.heads, route.present)
        route.awaits_forward = not by_itself and of_outer is None
        with state.router.using(route):
            return function(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._compiled_call_impl is not None:  # by `model.compile()`: what it traces must set the route
            return plain.__call__(self, *args, **kwargs)
        return run(self, plain.__call__, args, kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, plain.forward, args, kwargs)

    forward.__signature__ = arguments.signature()  # type: ignore[attr-defined]
    forward.__doc__ = plain.forward.__doc__

    def reduce(self: Any, protocol: Any) -> Any:
        how = plain.__reduce_ex__(self, protocol)
        if type(self) is not made or how[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return how
        return (_empty, (plain,), *how[2:])

    def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + UNLOADED, None)
        plain._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    namespace = {
        "__call__": call,
        "forward": forward,
        "_load_from_state_dict": load_from_state_dict,
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        "_plain_class": plain,
    }
    if callable(plain_save := getattr(plain, "save_pretrained", None)):

        @functools.wraps(plain_save)
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            if OUTER not in vars(self):
                plain_save(self, save_directory, *args, **kwargs)
            else:
                from fastmask.models.saving import save_pretrained as save  # which imports this module

                names = list(inspect.signature(plain_save).parameters)[2:]
                save(self, save_directory, **dict(zip(names, args, strict=False)), **kwargs)

        namespace["save_pretrained"] = save_pretrained
    if callable(plain_generate := getattr(plain, "generate", None)):

        @functools.wraps(plain_generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            names = arguments.taken(kwargs)
            state: Attached | None = getattr(self, OUTER, None) or getattr(self, INNER, None)
            if state is not None and "language" not in names:
                ids = ids_of(names, state.router.languages)
                names = {} if ids is None else {"language_ids": ids}  # tensors are repeated for beams, names are not
            return plain_generate(self, *args, **names, **kwargs)

        namespace["generate"] = generate
    if callable(plain_batch := getattr(plain, "generate_batch", None)):

        @functools.wraps(plain_batch)
        def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            state: Attached | None = getattr(self, OUTER, None) or getattr(self, INNER, None)
            if state is not None and (arguments.taken(kwargs) or state.router.default.get() is not None):
                raise ValueError(
                    "continuous batching joins requests in one row, in a thread of its own, and tells no languages: it "
                    "runs in that of `fastmask.set_language(model, ...)` only. Use `generate` for several"
                )
            return plain_batch(self, *args, **kwargs)

        namespace["generate_batch"] = generate_batch
    made = _CLASSES.setdefault(plain, type(plain.__name__, (plain,), namespace))
    return made


def plain_class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model without subnetworks; it may have been made by `type(attached)(config)`."""
    found: type[nn.Module] = getattr(type(model), "_plain_class", type(model))
    return found


def inner_models(model: nn.Module, masked: Mapping[str, Any]) -> Iterator[nn.Module]:
    """The models inside a model that people call by themselves: of `transformers`, over masked layers."""
    parts = [getter() for name in ("get_encoder", "get_decoder") if callable(getter := getattr(model, name, None))]
    for name, module in model.named_modules():
        is_model = callable(getattr(module, "save_pretrained", None)) or any(module is part for part in parts)
        if name and is_model and any(layer.startswith(f"{name}.") for layer in masked):
            yield module


def _empty(plain: type[nn.Module]) -> nn.Module:
    """What copies and pickles of attached models begin with: their class has no name that it could be found under."""
    kind = attached_class(plain)
    return kind.__new__(kind)
