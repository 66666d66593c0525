"""Caches of keys and values: whoever continues one may have other languages than whoever filled it.

So each head keeps its slot in a cache, dead ones hold zeros, and attention is that of weights multiplied by masks,
whatever languages come next, and whatever rows are dropped or put in another order. A new cache that is filled for one
language alone takes its live heads packed, which is smaller and faster, and is unpacked where another one continues it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

__all__ = ["CacheArguments", "packs_heads"]

_PACKED = "_fastmask_packed"  # of a cache: the live heads [layers][heads] that its layers hold, and nothing else
_NAMES = ("cache", "past_key_values")  # of one argument, in newer and older releases of transformers

LiveHeads = tuple[tuple[bool, ...], ...]


class CacheArguments:
    """Where a model's forward takes its cache, and whether to make one."""

    def __init__(self, signature: inspect.Signature) -> None:
        names = list(signature.parameters)[1:]  # without self
        self._positions = {name: names.index(name) for name in (*_NAMES, "use_cache") if name in names}

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache that a call is given, or None."""
        for name in _NAMES:
            given = self._given(name, args, kwargs)
            if given is not None:
                return given
        return None

    def asks_for_one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call says that the model is to make a cache."""
        return bool(self._given("use_cache", args, kwargs))

    def without(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that says nothing about caches, saying that none is to be made."""
        position = self._positions.get("use_cache")
        if position is None:
            return args, kwargs
        if position < len(args):
            return (*args[:position], False, *args[position + 1 :]), kwargs
        return args, {**kwargs, "use_cache": False}

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._positions.get(name)
        return args[position] if position is not None and position < len(args) else kwargs.get(name)


def packs_heads(cache: Any, heads: Tensor, present: tuple[int, ...] | None) -> bool:
    """Whether a pass that fills or continues a cache sends its heads packed; the cache is made ready for it.

    Args:
        cache: any cache of transformers, or None for one that the model will make.
        heads: bool [L, layers, heads], the masks of the attached subnetworks.
        present: the languages of the batch, if they are known.

    Raises:
        ValueError: the cache holds another number of heads, and it does not say which.
    """
    packed: LiveHeads | None = getattr(cache, _PACKED, None)
    if torch.compiler.is_compiling():
        fits = False
    elif packed is None:
        _check(cache, heads.shape[2])
        if fits := present is not None and len(present) == 1 and present[0] >= 0 and _is_new(cache):
            setattr(cache, _PACKED, _live(heads[present[0]]))
    else:
        fits = present is not None and len(present) == 1 and present[0] >= 0 and _live(heads[present[0]]) == packed
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
    """Put the heads of a packed cache into their slots."""
    for layer, live in zip(cache.layers, packed, strict=False):
        if layer.is_initialized and layer.keys.ndim == 4:
            slots = torch.tensor([slot for slot, there in enumerate(live) if there], device=layer.keys.device)
            layer.keys, layer.values = (_spread(states, slots, len(live)) for states in (layer.keys, layer.values))


def _spread(states: Tensor, slots: Tensor, heads: int) -> Tensor:
    """[B, packed heads, T, size] -> [B, heads, T, size]; a layer without live heads has one of zeros."""
    whole = states.new_zeros(states.shape[0], heads, *states.shape[2:])
    return whole.index_copy(1, slots.long(), states[:, : len(slots)])


def _check(cache: Any, heads: int) -> None:
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
        states = getattr(layer, "keys", None)
        if isinstance(states, Tensor) and states.ndim == 4 and states.shape[1] != heads:
            raise ValueError(
                f"the cache holds {states.shape[1]} (key/value) heads in a layer, expected {heads}. A cache that was "
                "filled for one language alone holds the heads of that language: continue the cache object itself, or "
                "a copy.deepcopy of it, not another that is made of its tensors"
            )
