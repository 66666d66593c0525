"""A call of an attached model: its languages are taken from the arguments, and its layers run under their route.

Caches of keys and values are made ready for it: whoever continues one may have other languages than whoever filled it.
So each head keeps its slot in a cache, dead ones hold zeros, and attention is that of weights multiplied by masks,
whatever languages come next, and whatever rows are dropped or put in another order. A new cache that is filled for one
language alone takes its live heads packed, which is smaller and faster, and is unpacked where another one continues it.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmask.masks import FULL
from fastmask.models.languages import ids_of

if TYPE_CHECKING:
    from fastmask.models.attach import Attached

OUTER, INNER = "_fastmask", "_fastmask_of_outer"  # where the state is kept: on the model, and on models inside of it

ORIGIN = "_fastmask_origin"  # where `from_pretrained` notes what it loaded

UNLOADED = "fastmask.masks_were_not_loaded.use_fastmask_from_pretrained"
"""A name among saved weights that plain `from_pretrained` warns of: without masks the model is another one.

Under it are the bytes of the masks. Where weights are loaded into an attached model (`Trainer` does, to resume and for
the best checkpoint), it runs with the masks that they were saved with. With ``forward="full"`` there is no such name:
the weights are those of the full network.
"""

# The arguments that say languages. `language=None` says something (the full network), so its default is `...`;
# `language_counts` says nothing by itself: it tells which languages are in `language_ids` that lie on a GPU.
_LANGUAGES: dict[str, tuple[Any, Any]] = {
    "language": (..., str | None),
    "languages": (None, Sequence[str | None] | None),
    "language_ids": (None, Tensor | Sequence[int] | None),
    "language_counts": (None, Tensor | None),
}
_PACKED = "_fastmask_packed"  # of a cache: the live heads [layers][heads] that its layers hold, and nothing else

LiveHeads = tuple[tuple[bool, ...], ...]

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class _Arguments:
    """The arguments of a model's forward, and those of languages that an attached model takes beside them."""

    def __init__(self, signature: inspect.Signature) -> None:
        self._plain = signature
        self._own = tuple(name for name in _LANGUAGES if name not in signature.parameters)
        self._positions = {name: at - 1 for at, name in enumerate(signature.parameters) if at > 0}  # without self
        self._tokens = [name for name in ("input_ids", "inputs_embeds") if name in self._positions]

    def signature(self) -> inspect.Signature:
        """That of the attached forward."""
        parameters = list(self._plain.parameters.values())
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (default, kind) in _LANGUAGES.items()
            if name in self._own
        ]
        position = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return self._plain.replace(parameters=[*parameters[:position], *extra, *parameters[position:]])

    def languages_in(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call says of languages, taken out of its keyword arguments: one of them, and perhaps counts."""
        given = {name: kwargs.pop(name) for name in self._own if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None or name == "language"}
        if len(given.keys() - {"language_counts"}) > 1:
            raise ValueError(f"{' and '.join(given)} were given: use one of them, they say the same")
        return given

    def sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """The sizes of the tokens of a call, [B, T] or [B, choices, T], if it has any."""
        for name in self._tokens:
            value = self.given(name, args, kwargs)
            if isinstance(value, Tensor):
                return tuple(value.shape if name == "input_ids" else value.shape[:-1])
        return None

    def given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives for an argument of the plain forward, by position or by name; None if nothing."""
        position = self._positions.get(name)
        return args[position] if position is not None and position < len(args) else kwargs.get(name)

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache that a call is given: the argument has another name in older releases of transformers."""
        cache = self.given("cache", args, kwargs)
        return self.given("past_key_values", args, kwargs) if cache is None else cache

    def without_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that says nothing about caches, saying that none is to be made."""
        position = self._positions.get("use_cache")
        if position is None:
            return args, kwargs
        if position < len(args):
            return (*args[:position], False, *args[position + 1 :]), kwargs
        return args, {**kwargs, "use_cache": False}


def attached_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of a model's class, under the same name, that takes languages when it is called.

    A subclass, and not functions on the instance or hooks: copies of the model run their own, the route ends with the
    call whatever ends it, `isinstance` and `inspect.signature(model.forward)` go on working. Languages are taken at
    `__call__`, whatever forward others have put on the instance; a forward that is called by itself takes them, too.
    """
    if plain in _CLASSES:
        return _CLASSES[plain]
    arguments = _Arguments(inspect.signature(plain.forward))

    def run(self: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: Attached | None = getattr(self, OUTER, None)
        of_outer: Attached | None = getattr(self, INNER, None) if state is None else None
        given = arguments.languages_in(kwargs)
        if of_outer is not None and not given:
            running = of_outer.router.running
            if running.route is not None or not running.generating:
                return function(self, *args, **kwargs)  # in a pass of the outer model, or as layers find it themselves
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
        given = given or state.router.running.generating
        ids = ids_of(given, state.router.languages)
        route = state.router.resolve(ids, arguments.sizes(args, kwargs), given.get("language_counts"))
        cache = arguments.cache(args, kwargs)
        if state.router.full_forward:
            pass  # keys and values are those of all heads
        elif cache is None and not arguments.given("use_cache", args, kwargs):
            args, kwargs = arguments.without_cache(args, kwargs)
            asked = arguments.given("output_attentions", args, kwargs)
            asked = getattr(getattr(self, "config", None), "output_attentions", False) if asked is None else asked
            # No cache will hold what one pass has chosen; attention probabilities are of live heads, however chosen.
            if route.packs_heads and not asked and route.present is not None and len(route.present) > 1:
                route.spread = set()
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
        saved = state_dict.pop(prefix + UNLOADED, None)
        if saved is not None and OUTER in vars(self):
            from fastmask.models.saving import restore_masks  # which imports this module

            restore_masks(self, saved)
        plain._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        if prefix.endswith(("base_model.", "base_model.model.")) and OUTER in vars(self):
            warnings.warn(
                "PEFT saves adapters without the masks of the model below: fastmask.save_pretrained(model, folder, "
                "weights=False) writes those beside them",
                stacklevel=2,
            )
        plain._save_to_state_dict(self, destination, prefix, keep_vars)

    namespace = {
        "__call__": call,
        "forward": forward,
        "_load_from_state_dict": load_from_state_dict,
        "_save_to_state_dict": save_to_state_dict,
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        "_plain_class": plain,
    }
    if callable(plain_save := getattr(plain, "save_pretrained", None)):

        @functools.wraps(plain_save)
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            if state_of(self) is None:
                plain_save(self, save_directory, *args, **kwargs)
            else:
                from fastmask.models.saving import save_pretrained as save  # which imports this module

                names = list(inspect.signature(plain_save).parameters)[2:]
                save(self, save_directory, **dict(zip(names, args, strict=False)), **kwargs)

        namespace["save_pretrained"] = save_pretrained
    if callable(plain_generate := getattr(plain, "generate", None)):
        has_language = "language" in inspect.signature(plain_generate).parameters  # Whisper: a token to begin with

        @functools.wraps(plain_generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            its_own = {"language": kwargs.pop("language")} if has_language and "language" in kwargs else {}
            names, state = arguments.languages_in(kwargs), state_of(self)
            if state is None:
                return plain_generate(self, *args, **its_own, **names, **kwargs)
            given = names
            if "language" not in names:
                ids = ids_of(names, state.router.languages)
                # Tensors are repeated for beams, names are not.
                given = names = {} if ids is None else {"language_ids": ids}
                if isinstance(ids, Tensor) and ids.is_cpu and len(present := set(ids.flatten().tolist())) == 1:
                    # One for all, however many rows a step has: Whisper drops those that have come to their end.
                    (only,), names = present, {}
                    given = {"language": None if only == FULL else state.router.languages[only]}
            if has_language and not given and not state.router.has_default:
                raise ValueError(
                    f"no language was given: the argument `language` of {plain.__name__}.generate is that model's own. "
                    "Pass languages=[...] or language_ids=..., or use `with fastmask.language(model, ...)` or "
                    "`fastmask.set_language(model, ...)`"
                )
            with state.router.generating(given):
                return plain_generate(self, *args, **its_own, **names, **kwargs)

        namespace["generate"] = generate
    if callable(plain_batch := getattr(plain, "generate_batch", None)):

        @functools.wraps(plain_batch)
        def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = state_of(self)
            if state is not None and (arguments.languages_in(kwargs) or state.router.default.get() is not None):
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


def state_of(module: nn.Module) -> Attached | None:
    """What `attach` left on a model, or on one inside of it."""
    found: Attached | None = vars(module).get(OUTER) or vars(module).get(INNER)
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


# ---- caches of keys and values


def packs_heads(cache: Any, heads: Tensor, present: tuple[int, ...] | None) -> bool:
    """Whether a pass that fills or continues a cache (None: makes one) sends its heads packed; the cache is made ready.

    heads: bool [L, layers, heads], the attached masks; present: the languages of the batch, if they are known.
    """
    packed: LiveHeads | None = getattr(cache, _PACKED, None)
    alone = present is not None and len(present) == 1 and present[0] >= 0
    if torch.compiler.is_compiling():
        fits = False
    elif packed is None:
        _check(cache, heads.shape[2])
        if fits := alone and _is_new(cache):
            setattr(cache, _PACKED, _live(heads[present[0]]))  # type: ignore[index]
    else:
        fits = alone and _live(heads[present[0]]) == packed  # type: ignore[index]
    if packed is not None and not fits:
        _unpack(cache, packed)
        setattr(cache, _PACKED, None)
    return fits


def _live(heads: Tensor) -> LiveHeads:
    return tuple(tuple(layer) for layer in heads.tolist())


def _is_new(cache: Any) -> bool:
    """Whether nothing was ever put into a cache whose layers can be unpacked."""
    # Not at the top: whoever has a cache has imported it already.
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.is_initialized
            for layer in cache.layers
        )
    )


def _unpack(cache: Any, packed: LiveHeads) -> None:
    """Put the heads of a packed cache into their slots; a layer without live heads has one of zeros."""
    for layer, live in zip(cache.layers, packed, strict=False):
        if layer.is_initialized and layer.keys.ndim == 4:
            slots = torch.tensor([slot for slot, there in enumerate(live) if there], device=layer.keys.device)
            for name in ("keys", "values"):
                states = getattr(layer, name)
                whole = states.new_zeros(states.shape[0], len(live), *states.shape[2:])
                setattr(layer, name, whole.index_copy(1, slots.long(), states[:, : len(slots)]))


def _check(cache: Any, heads: int) -> None:
    """Refuse a cache of another number of heads that does not say which they are."""
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
        states = getattr(layer, "keys", None)
        if isinstance(states, Tensor) and states.ndim == 4 and states.shape[1] != heads:
            raise ValueError(
                f"the cache holds {states.shape[1]} (key/value) heads in a layer, expected {heads}. A cache that was "
                "filled for one language alone holds the heads of that language: continue the cache object itself, or "
                "a copy.deepcopy of it, not another that is made of its tensors"
            )
