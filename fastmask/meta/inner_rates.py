"""Inner learning rates: one for all parameters, one for each group of names, or groups as torch optimizers have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastmask.errors import unknown

__all__ = ["InnerRates", "rates_of", "reusable"]

InnerRates = float | Mapping[str, float] | Iterable[Mapping[str, Any]]


def rates_of(model: nn.Module, rates: InnerRates) -> dict[Tensor, float]:
    """The inner learning rate of each trainable parameter that is adapted; a rate of 0 leaves it out.

    Args:
        model: its parameters that require a gradient count, tied ones once, under their first name.
        rates: see `fastmask.MetaLearner`.

    Raises:
        ValueError: a rate that is not a finite number >= 0, a parameter without or with two, or nothing to adapt.
        KeyError: a group's name that is not the beginning of any parameter's name.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(rates, (int, float)):
        found: dict[Tensor, float] = dict.fromkeys(trainable.values(), _checked(rates, "all parameters"))
    elif isinstance(rates, Mapping):
        found = _by_name(trainable, {name: _checked(rate, repr(name)) for name, rate in rates.items()}, model)
    else:
        found = _by_group(trainable, list(rates))
    adapted = {parameter: rate for parameter, rate in found.items() if rate > 0}
    if not adapted:
        raise ValueError("no parameter would be adapted: every inner learning rate is 0, or all parameters are frozen")
    return adapted


def reusable(rates: InnerRates) -> InnerRates:
    """The same rates, without generators, which could be read only once."""
    if isinstance(rates, (int, float, Mapping)):
        return rates
    return [
        {**group, "params": list(group["params"])}
        if isinstance(group, Mapping) and isinstance(group.get("params"), Iterator)
        else group
        for group in rates
    ]


def _by_name(trainable: dict[str, nn.Parameter], rates: Mapping[str, float], model: nn.Module) -> dict[Tensor, float]:
    everything = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(_is_below(name, prefix) for name in everything):
            choices = {name.split(".")[0] for name in everything} | {name.rpartition(".")[0] for name in everything}
            raise unknown("parameter group", prefix, choices)
    found: dict[Tensor, float] = {}
    for name, parameter in trainable.items():
        prefixes = [prefix for prefix in rates if _is_below(name, prefix)]
        if not prefixes:
            raise ValueError(
                f"parameter {name!r} has no inner learning rate: groups {', '.join(map(repr, rates))}; "
                "a group named '' takes all that is left, a rate of 0 leaves parameters as they are"
            )
        found[parameter] = rates[max(prefixes, key=len)]
    return found


def _by_group(trainable: dict[str, nn.Parameter], groups: list[Mapping[str, Any]]) -> dict[Tensor, float]:
    known = set(trainable.values())
    found: dict[Tensor, float] = {}
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not {"params", "lr"} <= set(group):
            raise ValueError(f"inner learning rate group {number}: expected a dict with 'params' and 'lr'")
        rate = _checked(group["lr"], f"group {number}")
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        for parameter in params:
            if parameter in found:
                raise ValueError(f"a parameter of inner learning rate group {number} is in another group, too")
            if parameter.requires_grad and parameter not in known:
                raise ValueError(f"inner learning rate group {number} holds a parameter that is not of the model")
            if parameter.requires_grad:
                found[parameter] = rate
    return found


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _checked(rate: Any, what: str) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
        raise ValueError(f"inner learning rate of {what} is {rate!r} (expected a finite number >= 0)")
    return float(rate)
