"""A mask around a module that is more than a linear layer: LoRA of PEFT, quantised weights.

The module runs as it is. Masking whole rows of a weight is masking its outputs, masking columns its inputs, whatever
the weight is made of: exact, at dense cost, and adapters are masked with the weight that they are added to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.models.routing import Router

__all__ = ["Around", "is_wrapped"]

_QUANTISED = ("bitsandbytes.", "optimum.quanto.", "torchao.", "auto_gptq.", "gptqmodel.", "awq.", "hqq.")


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is an adapter around a linear layer, or a quantised one."""
    if hasattr(module, "base_layer") or type(module).__module__.startswith(_QUANTISED):
        return True
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and type(weight).__module__.startswith(_QUANTISED)


class Around:
    """The masks of a module's rows (put on its output) or columns (on its input), as hooks.

    Args:
        mask: over rows or columns.
        router: where the languages of a pass are looked up.
    """

    def __init__(self, mask: Mask, router: Router) -> None:
        self.mask, self.router = mask, router
        self._handle: Any = None

    @property
    def mask(self) -> Mask:
        """The mask; it may be replaced."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._mask = mask
        dense = mask.to_dense()
        dead = ~(dense[:, :, 0] if mask.kind == "rows" else dense[:, 0])
        self._dead = torch.cat([dead, torch.zeros_like(dead[:1])])  # the last one is the full network's, -1

    def put(self, module: nn.Module) -> None:
        """Start to mask a module."""
        if self.mask.kind == "rows":
            self._handle = module.register_forward_hook(self._of_output)
        else:
            self._handle = module.register_forward_pre_hook(self._of_input)

    def take_off(self) -> None:
        """Stop it."""
        self._handle.remove()

    def _of_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._masked(output)

    def _of_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._masked(args[0]), *args[1:])

    def _masked(self, x: Tensor) -> Tensor:
        if self._dead.device != x.device:
            self._dead = self._dead.to(x.device)
        route = self.router.current()
        examples, ids = route.examples(x)
        dead = self._dead[ids].view(examples.shape[0], *[1] * (examples.ndim - 2), -1)
        return route.joined(examples.masked_fill(dead, 0))
