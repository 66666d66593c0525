"""The plan of a batch: made from its language ids once, for all layers that run it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from fastmask_kernels.plan import Plan
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["plan_of"]


class _Made(NamedTuple):
    plan: Plan
    version: int  # of the ids: writing to them in place makes the plan outdated


_made: MutableMapping[Tensor, dict[tuple[int, int, torch.device], _Made]] = WeakIdKeyDictionary()


def plan_of(language_ids: Tensor, tokens: int, n_languages: int, device: torch.device) -> Plan:
    """The plan of a batch of examples of `tokens` tokens each, on `device`.

    Ids out of range are found on the device, without waiting for it: as with an index of `torch.embedding`, the next
    call that does wait raises a device-side assertion.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and not hasattr(language_ids, "_fastmask_of_one_pass"):
        # A graph's replays read new ids from the same memory: the plan must be made inside of each graph. Ids that live
        # for one pass only (`models.routing`) cannot have one from outside.
        return _plan(language_ids, tokens, n_languages, device)
    plans = _made.setdefault(language_ids, {})
    key = (tokens, n_languages, device)
    made = plans.get(key)
    version = 0 if language_ids.is_inference() else language_ids._version
    if made is None or made.version != version:
        made = plans[key] = _Made(_plan(language_ids, tokens, n_languages, device), version)
    return made.plan


def _plan(language_ids: Tensor, tokens: int, n_languages: int, device: torch.device) -> Plan:
    ids = language_ids.to(device, non_blocking=True)
    if ids.numel():
        inside = ((ids >= -1) & (ids < n_languages)).all()
        torch._assert_async(inside, f"language_ids out of range: expected -1 to {n_languages - 1}")
    return Plan(ids, tokens, n_languages)
