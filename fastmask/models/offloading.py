"""Hooks of accelerate (`device_map`, offload), which stand in a module's forward: masked layers take them over."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["follow_class", "hook_of", "move_hook", "unhook_if_alone"]


def hook_of(module: nn.Module) -> Any:
    """The hook that aligns a module's devices, or None; other hooks are not known to work on another module."""
    hook = vars(module).get("_hf_hook")
    return hook if type(hook).__name__ == "AlignDevicesHook" else None


def move_hook(module: nn.Module, layer: nn.Module) -> None:
    """Put the hook of a module, if it has one, on the layer that takes its place and has its parameters."""
    hook = hook_of(module)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module  # not at the top: it takes a second, and is rarely needed

    before = vars(hook).get("original_devices")
    add_hook_to_module(layer, hook)
    if before is not None:  # it has looked at weights that are offloaded, and would leave them there when taken off
        hook.original_devices = before


def unhook_if_alone(module: nn.Module, layer: nn.Module) -> None:
    """Take the hook off a module that is put back, if it was taken off the layer meanwhile."""
    if hook_of(module) is not None and hook_of(layer) is None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)


def follow_class(module: nn.Module) -> None:
    """Let the hook of a module call the forward of its class, which has changed, and show its signature."""
    forward = vars(module).get("forward")
    if hook_of(module) is None or not isinstance(forward, functools.partial):
        return
    old: Any = MethodType(type(module).forward, module)
    vars(module)["_old_forward"] = old
    vars(forward).clear()
    functools.update_wrapper(forward, old)
