"""The plan of a batch: made from its language ids once, for all layers that run it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from fastmask_kernels.plan import Plan
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastmask.triton_path.kept import is_capturing, stream_of

__all__ = ["plan_of"]


class _Made(NamedTuple):
    plan: Plan
    version: int  # of the ids: writing to them in place makes the plan outdated


# By (tokens, languages, device, stream): nothing says when another stream has finished making a plan.
_made: MutableMapping[Tensor, dict[tuple[int, int, torch.device, int], _Made]] = WeakIdKeyDictionary()


def plan_of(language_ids: Tensor, tokens: int, n_languages: int, device: torch.device) -> Plan:
    """The plan of a batch of examples of `tokens` tokens each, on `device`.

    Ids out of range are found on the device, without waiting for it: as with an index of `torch.embedding`, the next
    call that does wait raises a device-side assertion.
    """
    # Ids that live for one pass only (`models.routing`) do not change. Of others it is not known: a graph's replays
    # read new ids from the same memory, and tensors of inference mode do not count what is written to them.
    of_one_pass = getattr(language_ids, "_fastmask_of_one_pass", None)
    key = (tokens, n_languages, device, stream_of(device))
    if of_one_pass is not None:
        plan: Plan | None = of_one_pass.get(key)
        if plan is None:
            plan = of_one_pass[key] = _plan(language_ids, tokens, n_languages, device)
        return plan
    if is_capturing(device) or language_ids.is_inference():
        return _plan(language_ids, tokens, n_languages, device)
    plans = _made.setdefault(language_ids, {})
    made = plans.get(key)
    if made is None or made.version != language_ids._version:
        made = plans[key] = _Made(_plan(language_ids, tokens, n_languages, device), language_ids._version)
    return made.plan


def _plan(language_ids: Tensor, tokens: int, n_languages: int, device: torch.device) -> Plan:
    plan = Plan(language_ids.to(device, non_blocking=True), tokens, n_languages)
    torch._assert_async(plan.ok, f"language_ids out of range: expected -1 to {n_languages - 1}")
    return plan
