"""Finding the languages of a forward pass again when gradient checkpointing recomputes it inside the backward pass.

What is recomputed no longer runs under the languages of then: `with fastmask.language(...)` may have been left, and a
layer is called without its model. Only the checkpoint itself is there both times: `torch.utils.checkpoint` has an
object for each, reentrant or not, and so has every checkpoint that is written as an `autograd.Function`. It is found on
the stack, and carries the languages from the forward pass to the recomputation, whatever thread that runs in.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["may_recompute", "recall", "remember"]

_FILE = inspect.unwrap(checkpoint).__code__.co_filename
_NAME = "_fastmask_routes"
_COMPILED = "torch._functorch._aot_autograd.runtime_wrappers"  # the function that `torch.compile` makes of a program

# What autograd would save goes through these functions, if there are any: those of a checkpoint, for one.
_saving_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def may_recompute(began_with_grad: bool) -> bool:
    """Whether the code that runs may be inside a checkpoint: cheap to ask, and true whenever it is.

    A checkpoint catches what autograd would save, or turns gradients off and computes everything again.
    """
    return _saving_hooks(False) is not None or (began_with_grad and not torch.is_grad_enabled())


def remember(number: int, route: Any) -> None:
    """Leave a route of model `number` with the checkpoint that the calling code is inside of, if it is inside one."""
    found = _checkpoint()
    if found is None:
        return
    routes = getattr(found, _NAME, None)
    if routes is None:
        routes = {}
        setattr(found, _NAME, routes)
    known = routes.setdefault(number, route)
    if known is not route and (known is None or not known.equals(route)):
        routes[number] = None  # several: which one a recomputed call had is not known


def recall(number: int) -> Any:
    """The route that was left with the checkpoint whose recomputation is running; None if there is none, or several."""
    routes: dict[int, Any] = getattr(_checkpoint(), _NAME, {})
    return routes.get(number)


def _checkpoint() -> Any:
    """The object of the innermost checkpoint on the stack; the same one in the forward pass and when recomputed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, found = frame.f_code, None
        if code.co_name in ("forward", "backward"):
            if code.co_varnames[:1] == ("ctx",) and frame.f_globals.get("__name__") != _COMPILED:
                found = frame.f_locals["ctx"]
        elif code.co_filename == _FILE:
            if code.co_name == "checkpoint" and (run := frame.f_locals.get("gen")) is not None:
                found = run.gi_frame.f_locals.get("new_frame")
            elif code.co_name == "unpack_hook":
                found = frame.f_locals.get("frame")
        elif code.co_name == "_engine_run_backward":
            return None  # a backward pass lies between: whatever began it does not recompute what runs here
        if found is not None:
            return found
        frame = frame.f_back
    return None
