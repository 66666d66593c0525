"""Moments of what may learn, and of nothing else: a parameter of which languages own little keeps only those.

What a step reads and writes of such a parameter is copied out, stepped like a smaller parameter, and put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.live import WHOLE, Live
from fastmask.optim.step import Update

__all__ = ["HELD", "CompactState"]

# Share of a parameter above which copying out and back takes more time than all that it saves: single weights lie
# apart, and above their share their places are not kept either (`Live`), and found anew in each step.
LITTLE, LITTLE_OF_WEIGHTS = 1 / 2, 1 / 16
HELD = "held"  # in a state dict, beside the moments: which part of the parameter they are of


class CompactState:
    """Which part of each parameter its moments are of; it only ever grows, as languages and masks come along."""

    def __init__(self) -> None:
        self._held: dict[Tensor, Live] = {}
        self._within: dict[Tensor, tuple[Live, Live]] = {}  # the part that moved last, and what it is of what is held

    def begin(self, parameter: Tensor, owned: Live) -> Tensor:
        """A zero moment of a new parameter, of which the languages own that much."""
        if _is_little(owned):
            self._held[parameter] = owned
            return torch.zeros_like(owned.read(parameter))
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], part: Live) -> Update:
        """The step of a part of a parameter; `put_back` takes it when it was taken."""
        held = self._held.get(parameter)
        if held is not None and (parameter not in self._within or self._within[parameter][0] is not part):
            held, within = self._widened(parameter, state, held, part)
            if held is not None and within is not None:
                self._within[parameter] = part, within
        if held is None:
            return Update(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], part)
        tensors = held.read(parameter), held.read(gradient), state["exp_avg"], state["exp_avg_sq"]
        flat = [tensor.view(1, -1) for tensor in tensors]
        return Update(flat[0], flat[1], flat[2], flat[3], state["step"], self._within[parameter][1])

    def put_back(self, parameter: Tensor, update: Update, state: dict[str, Tensor]) -> None:
        """Write what a step has made of a copy into the parameter."""
        if parameter in self._held:
            self._held[parameter].write(parameter, update.parameter.view(state["exp_avg"].shape))

    def _widened(
        self, parameter: Tensor, state: dict[str, Tensor], held: Live, part: Live
    ) -> tuple[Live | None, Live | None]:
        """What is held once it holds `part` too (None: everything), and what `part` is of that."""
        within = part.within(held, parameter)
        if within is not None:
            return held, within
        wide = held.joined(part)
        for name in ("exp_avg", "exp_avg_sq"):
            whole = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            held.write(whole, state[name])
            state[name] = wide.read(whole) if _is_little(wide) else whole
        self._within.pop(parameter, None)
        if _is_little(wide):
            self._held[parameter] = wide
            return wide, part.within(wide, parameter)
        del self._held[parameter]
        return None, None

    # ---- state dicts

    def saved(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """A state dict of the parameters in their order, with what is held of each."""
        held = {i: self._held[p].encoded() for i, p in enumerate(parameters) if p in self._held}
        states = {i: {**state, HELD: held[i]} if i in held else state for i, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    def loaded(self, state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """A state dict without what `saved` has added, which is what is held from now on.

        Raises:
            ValueError: moments or a part that do not fit their parameter. Nothing has changed then.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        held: dict[Tensor, Live] = {}
        states = dict(state_dict["state"])
        for number, p in zip(numbers, parameters, strict=False):  # torch says what is wrong with other numbers
            state = dict(states.get(number, {}))
            code = state.pop(HELD, None)
            part = WHOLE if code is None else Live.decoded(code, p.shape, p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state and code is not None and state[name].shape != part.read(p).shape:
                    raise ValueError(
                        f"{name} of parameter {number} has the shape {tuple(state[name].shape)}, "
                        f"expected {tuple(part.read(p).shape)}, the part of it that is held"
                    )
            if code is not None:
                held[p], states[number] = part, state
        self._held, self._within = held, {}
        return {**state_dict, "state": states}


def _is_little(part: Live) -> bool:
    return part.share <= (LITTLE_OF_WEIGHTS if part.kind == "weights" else LITTLE)
