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
    return hook if all(type(part).__name__ == "AlignDevicesHook" for part in _parts(hook)) else None


def _parts(hook: Any) -> tuple[Any, ...]:
    """Several that were joined by accelerate's `SequentialHook`, or the one."""
    return tuple(vars(hook)["hooks"]) if type(hook).__name__ == "SequentialHook" else (hook,)


def move_hook(module: nn.Module, layer: nn.Module) -> None:
    """Put the hook of a module, if it has one, on the layer that takes its place and has its parameters."""
    hook = hook_of(module)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module  # not at the top: it takes a second, and is rarely needed

    before = [vars(part).get("original_devices") for part in _parts(hook)]
    add_hook_to_module(layer, hook)
    for part, devices in zip(_parts(hook), before, strict=True):
        if devices is not None:  # it has looked at weights that are offloaded, and would leave them so when taken off
            part.original_devices = devices


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
