"""What other libraries do to a model: refused before `attach` where masks would not hold, watched for afterwards.

`attach` takes the model itself, and `nn.Linear` layers that it calls with nothing in between. Adapters and quantised
layers may stay, with masks around them, and masked layers take over the hooks of accelerate (`device_map`, offload).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastmask.models.structure import is_conv1d

# By name: importing them takes seconds, and some belong to libraries that need not be there.
_WRAPPERS = {
    "OptimizedModule": " of torch.compile",
    "FSDPModule": " of fully_shard",
    "FullyShardedDataParallel": "",
    "DistributedDataParallel": "",
    "DataParallel": "",
    "DeepSpeedEngine": "",
}
_TRANSPARENT = ("OptimizedModule", "FullyShardedDataParallel", "CheckpointWrapper")  # they call a layer as it was
_QUANTISED = ("bitsandbytes.", "optimum.quanto.", "torchao.", "auto_gptq.", "gptqmodel.", "awq.", "hqq.")
_UNHOOK = "`accelerate.hooks.remove_hook_from_submodules(model)` takes its hooks off"


def kind_of(thing: object) -> str:
    """The full name of a type: layers of PEFT, of bitsandbytes and of torch are all called Linear."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is an adapter around a linear layer, or a quantised one."""
    if hasattr(module, "base_layer") or type(module).__module__.startswith(_QUANTISED):
        return True
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and type(weight).__module__.startswith(_QUANTISED)


# ---- before attach


def check_model(model: nn.Module) -> None:
    """Refuse a model that is a wrapper."""
    names = {kind.__name__ for kind in type(model).__mro__}
    what = f"expected the model itself, given {type(model).__name__}"
    if names & {"PeftModel", "PeftMixedModel", "BaseTuner"}:
        raise ValueError(
            f"{what} of PEFT: attach to the model inside, `peft_model.get_base_model()` (adapters on modules without "
            "masks go on working), or merge the adapters first (`merge_and_unload()`)"
        )
    for name in names & _WRAPPERS.keys():
        raise ValueError(f"{what}{_WRAPPERS[name]}: attach first, wrap afterwards")


def is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is just that of the module's class, bound to the module.

    Or what the class has decorated: `Accelerator.unwrap_model` takes more off than `prepare` put on.
    """
    if getattr(forward, "__self__", None) is not module:
        return False
    bound, of_class = getattr(forward, "__func__", None), type(module).forward
    while of_class is not None and of_class is not bound:
        of_class = getattr(of_class, "__wrapped__", None)
    return of_class is not None


def plain_linear(model: nn.Module, name: str) -> Any:
    """The linear layer (or `Conv1D`) of that name, if it can be masked."""
    module = model.get_submodule(name)
    # Some models have linear layers of their own (Falcon): `attach` tries whether they do what they should.
    own = isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    if type(module) is not nn.Linear and not own and not is_conv1d(module):
        if hasattr(module, "base_layer"):
            advice = "merge the adapter first (PEFT: `merge_and_unload()`), an adapter and a mask cannot share a module"
        elif hasattr(module, "parametrizations"):
            advice = "remove the parametrization, and register it again after attach"
        else:
            advice = "quantised layers, and others that take the place of nn.Linear, cannot be masked"
        raise ValueError(f"expected a plain nn.Linear at {name!r}, found {kind_of(module)}: {advice}")
    why = obstacle(module, hook_of(module))
    weight: Any = module._parameters.get("weight")
    expected = (module.nx, module.nf) if is_conv1d(module) else (module.out_features, module.in_features)
    path = name.split(".")
    if why is None and (is_foreign(weight) or not weight.is_floating_point()):
        why = f"its weight is {kind_of(weight)} of {weight.dtype}, and quantised layers cannot be masked"
    elif why is None and tuple(weight.shape) != expected:
        why = f"its weight has shape {tuple(weight.shape)}, expected {expected}"
    elif any(isinstance(model.get_submodule(".".join(path[:i])), nn.TransformerEncoderLayer) for i in range(len(path))):
        why = why or (
            "in evaluation mode nn.TransformerEncoderLayer reads the weights of its layers without calling them, and "
            "would leave masks out"
        )
    if why is not None:
        raise ValueError(f"cannot mask {name!r}: {why}")
    return module


def plain_experts(model: nn.Module, name: str) -> nn.Module:
    """The module of experts of that name, if it can be masked."""
    module = model.get_submodule(name)
    if "base_layer" in name.split("."):
        raise ValueError(f"cannot mask {name!r}, experts below an adapter: merge it first (PEFT: `merge_and_unload()`)")
    if why := _hung_on(module, hook_of(module)):
        raise ValueError(f"cannot mask {name!r}: {why}")
    for own, parameter in module._parameters.items():
        foreign = parameter is not None and (is_foreign(parameter) or not parameter.is_floating_point())
        if foreign or type(parameter).__name__ == "DTensor":
            raise ValueError(
                f"cannot mask {name!r}: its {own} is {kind_of(parameter)} of {parameter.dtype}, and quantised or "  # type: ignore[union-attr]
                "sharded experts cannot be masked"
            )
    return module


def check_shared(model: nn.Module, masked: Collection[str]) -> None:
    """Refuse masks over a module that the model also calls under a second name, where they would not hold."""
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        other = first.setdefault(module, name)
        if other != name and (name in masked or other in masked):
            raise ValueError(f"cannot mask {name!r}: it is the same module as {other!r} (expected one of its own)")


def obstacle(module: nn.Module, hook: Any = None) -> str | None:
    """What others have made of a module or hung on it, and would be lost with it; not `hook`, which is looked after."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        weight = module._parameters.get("weight")
        if weight is None or not module._parameters.keys() <= {"weight", "bias"}:
            return (
                f"its parameters are {', '.join(module._parameters) or 'elsewhere'} (expected weight, bias). Make "
                "pruning permanent (`torch.nn.utils.prune.remove`), remove weight_norm, gather shards"
            )
        if type(weight).__name__ == "DTensor" or weight.ndim != 2:
            return "its weight is sharded. Attach before sharding, detach a model that is not sharded"
    if why := _hung_on(module, hook):
        return why
    if (module._buffers or module._modules) and "plain" not in vars(module):  # experts share theirs
        return f"it also holds {', '.join([*module._buffers, *module._modules])}, which would be lost"
    return None


def _hung_on(module: nn.Module, hook: Any) -> str | None:
    for name, hooks in vars(module).items():
        # Not our own: `LiveAdamW` registers some, and finds new layers by itself.
        if name.endswith("_hooks") and not all(
            str(getattr(each, "__module__", "")).startswith("fastmask.") for each in hooks.values()
        ):
            return (
                f"it has {name.strip('_').replace('_', ' ')}. Remove them, and register them again afterwards (hooks "
                "on an attached layer see inputs and outputs packed to the live heads or neurons)"
            )
    forward = vars(module).get("forward")
    if forward is not None and not is_own(forward, module) and (hook is None or hook_of(module) is not hook):
        return f"its forward has been replaced, as accelerate's device_map and offload do ({_UNHOOK})"
    return None


def is_foreign(weight: Tensor) -> bool:
    """Whether a weight is a tensor of another library, which operators cannot read; torch's own know what to do."""
    return type(weight).__module__.split(".")[0] != "torch"


# ---- hooks of accelerate, which stand in the forward of a module


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


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let the hook of a module, too, call the forward of its new class, and show its signature."""
    module.__class__ = kind
    forward = vars(module).get("forward")
    if hook_of(module) is None or not isinstance(forward, functools.partial):
        return
    old: Any = MethodType(type(module).forward, module)
    vars(module)["_old_forward"] = old
    vars(forward).clear()
    functools.update_wrapper(forward, old)


# ---- after attach


Modules = dict[str, nn.Module | None]


class Places:
    """Where the modules that `attach` put into a model stand (and those with masks `around`), and if they still do."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], around: Collection[str] = ()) -> None:
        self._root = model._modules  # not the model: a circle would keep its memory until garbage is collected
        self._kinds = {name: type(module) for name, module in modules.items()}
        self._leaves: dict[str, tuple[Modules, str, nn.Module]] = {}
        self._linears: list[tuple[str, nn.Linear, tuple[int, int]]] = []
        for name, module in {**modules, **{name: model.get_submodule(name) for name in around}}.items():
            parent, _, child = name.rpartition(".")
            self._leaves[name] = (model.get_submodule(parent)._modules, child, module)
            if isinstance(module, nn.Linear) and name in modules:
                shape = module.out_features, module.in_features
                stored = shape[::-1] if getattr(module, "transposed", False) else shape
                self._linears.append((name, module, stored))
        self._steps = self._steps_down()

    def check(self) -> None:
        """Refuse to go on if a masked layer was replaced or wrapped, or its weight became something else."""
        for name, (modules, child, layer) in self._leaves.items():
            if modules.get(child) is not layer:
                _judge(name, layer, modules.get(child))
        for modules, child, module in self._steps:
            if modules.get(child) is not module:
                self._judge_parents()
                break
        for name, layer, shape in self._linears:
            weight = layer._parameters.get("weight")
            if type(weight) is not nn.Parameter or weight.shape != shape:
                _judge_weight(name, layer, weight, shape)

    # What `torch.compiler.assume_constant_result` does, without loading the compiler for everyone: the check runs while
    # a graph is traced; a module or weight of another type has it traced again.
    check._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def removable(self, plain: Mapping[str, nn.Module]) -> dict[str, tuple[Modules, str, nn.Module]]:
        """What `detach` takes out for `plain`, and where it stands: not what others have replaced by theirs."""
        found = {}
        for name, kind in self._kinds.items():
            modules, child, layer = self._leaves[name]
            now = modules.get(child)
            if now is layer:
                if type(layer) is not kind:
                    raise ValueError(
                        f"cannot detach: {name!r} has become {kind_of(layer)}. Remove parametrizations first"
                    )
                if why := obstacle(layer, hook_of(plain[name])):
                    raise ValueError(f"cannot detach, and lose what hangs on {name!r}: {why}")
                found[name] = (modules, child, layer)
            elif now is not None and layer in now.modules():
                raise ValueError(
                    f"cannot detach: the masked layer {name!r} is wrapped in {kind_of(now)}, which would be lost. Take "
                    "that off first (PEFT: `unload()`, or `merge_and_unload()`)"
                )
        return found

    def _steps_down(self) -> list[tuple[Modules, str, nn.Module]]:
        """Every step from the model to the parents of masked layers."""
        parents = {id(modules) for modules, _, _ in self._leaves.values()}

        def below(modules: Modules) -> list[tuple[Modules, str, nn.Module]]:
            steps = []
            for child, module in modules.items():
                if module is not None:
                    further = below(module._modules)
                    if further or id(module._modules) in parents:
                        steps += [(modules, child, module), *further]
            return steps

        return below(self._root)

    def _judge_parents(self) -> None:
        """Something above was replaced: by a wrapper, which is fine, or by something without masks, which is not."""
        steps = self._steps_down()
        reached = {id(self._root), *(id(module._modules) for _, _, module in steps)}
        for name, (modules, _, layer) in self._leaves.items():
            if id(modules) in reached:
                continue
            now: Any = self._root.get(name.split(".")[0])
            for child in name.split(".")[1:]:
                now = getattr(now, child, None)
            if isinstance(now, nn.Module):  # nothing: layers were cut off the model, which runs without them
                _judge(name, layer, now)
        self._steps = steps


def _judge(name: str, layer: nn.Module, now: nn.Module | None) -> None:
    """Refuse what stands in the place of a masked layer, unless it calls it as it was."""
    if now is None:
        raise ValueError(f"the masked layer {name!r} was removed after attach: call fastmask.detach(model) before that")
    if layer not in now.modules():
        raise ValueError(
            f"the masked layer {name!r} was replaced by {kind_of(now)} after attach, and its masks are gone with it: "
            "quantise or resize only modules without masks, or do so before attach (fastmask.detach(model) undoes it)"
        )
    if type(now).__name__ not in _TRANSPARENT:
        raise ValueError(
            f"the masked layer {name!r} was wrapped in {kind_of(now)} after attach, which would leave the adapter "
            "outside of the mask: put adapters on modules without masks, or attach after them. To go on, take it off "
            "(PEFT: `unload()`, or `merge_and_unload()`, which adds the adapters to the weights behind the masks)"
        )


def _judge_weight(name: str, layer: nn.Linear, weight: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse a weight that the layer cannot work with; shards (which may be flat) and traced weights are fine."""
    if weight is None:
        if others := layer._parameters.keys() - {"bias"}:  # none: parametrized, or in the flat parameter of FSDP
            raise ValueError(
                f"the masked layer {name!r} gets its weight from {', '.join(sorted(others))} in a hook (pruning, "
                "weight_norm), which comes too late for layers that are computed together: use a parametrization "
                "(torch.nn.utils.parametrize), or make it permanent (`torch.nn.utils.prune.remove`)"
            )
    elif is_foreign(weight):
        raise ValueError(
            f"the weight of the masked layer {name!r} became {kind_of(weight)} after attach, and quantised layers "
            "cannot be masked: call fastmask.detach(model) before that, or leave masked layers out (torchao: "
            "filter_fn=lambda module, name: type(module) is torch.nn.Linear)"
        )
    elif weight.ndim == 2 and tuple(weight.shape) != shape:
        raise ValueError(
            f"the masks of {name!r} are for a weight of shape {shape}, and its weight now has shape "
            f"{tuple(weight.shape)}: call fastmask.detach(model), then attach masks of that shape"
        )
