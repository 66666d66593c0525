"""What `attach` takes: the model itself, and `nn.Linear` layers that it calls with nothing in between.

Anything else that stands there, or hangs there, would be lost or would see something else than before: it is refused
with the reason before anything is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from fastmask.models.offloading import hook_of
from fastmask.models.structure import is_conv1d

__all__ = [
    "check_model",
    "check_shared",
    "is_foreign",
    "is_own",
    "kind_of",
    "obstacle",
    "plain_experts",
    "plain_linear",
]

# By name: importing them takes seconds, and some belong to libraries that need not be there.
_WRAPPERS = {
    "OptimizedModule": " of torch.compile",
    "FSDPModule": " of fully_shard",
    "FullyShardedDataParallel": "",
    "DistributedDataParallel": "",
    "DataParallel": "",
    "DeepSpeedEngine": "",
}
_UNHOOK = "`accelerate.hooks.remove_hook_from_submodules(model)` takes its hooks off"


def kind_of(thing: object) -> str:
    """The full name of a type: layers of PEFT, of bitsandbytes and of torch are all called Linear."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def check_model(model: nn.Module) -> None:
    """Refuse a model that is a wrapper.

    Raises:
        ValueError: names the wrapper, and says what to do.
    """
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
    """The linear layer (or `Conv1D`) of that name, if it can be masked.

    Raises:
        ValueError: it is wrapped, quantised, sharded, hooked, parametrized or pruned; says which, and what to do.
    """
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
    if why := obstacle(module, hook_of(module)) or _weight_obstacle(module):
        raise ValueError(f"cannot mask {name!r}: {why}")
    path = name.split(".")
    if any(isinstance(model.get_submodule(".".join(path[:i])), nn.TransformerEncoderLayer) for i in range(len(path))):
        raise ValueError(
            f"cannot mask {name!r}: in evaluation mode nn.TransformerEncoderLayer reads the weights of its layers "
            "without calling them, and would leave masks out"
        )
    return module


def plain_experts(model: nn.Module, name: str) -> nn.Module:
    """The module of experts of that name, if it can be masked.

    Raises:
        ValueError: it is wrapped, quantised, sharded, hooked or parametrized; says which, and what to do.
    """
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
    """Refuse masks over a module that the model also calls under a second name, where they would not hold.

    Raises:
        ValueError: names both.
    """
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
    if hooks := [name.strip("_") for name, value in vars(module).items() if name.endswith("_hooks") and _others(value)]:
        return (
            f"it has {hooks[0].replace('_', ' ')}. Remove them, and register them again afterwards (hooks on an "
            "attached layer see inputs and outputs packed to the live heads or neurons)"
        )
    forward = vars(module).get("forward")
    if forward is not None and not is_own(forward, module) and (hook is None or hook_of(module) is not hook):
        return f"its forward has been replaced, as accelerate's device_map and offload do ({_UNHOOK})"
    return None


def _others(hooks: Mapping[int, Any]) -> bool:
    """Whether there are hooks that are not our own (`LiveAdamW` registers some, and finds new layers by itself)."""
    return not all(str(getattr(hook, "__module__", "")).startswith("fastmask.") for hook in hooks.values())


def _weight_obstacle(linear: Any) -> str | None:
    weight: Any = linear.weight
    expected = (linear.nx, linear.nf) if is_conv1d(linear) else (linear.out_features, linear.in_features)
    if is_foreign(weight) or not weight.is_floating_point():
        return f"its weight is {kind_of(weight)} of {weight.dtype}, and quantised layers cannot be masked"
    if tuple(weight.shape) != expected:
        return f"its weight has shape {tuple(weight.shape)}, expected {expected}"
    return None


def is_foreign(weight: Tensor) -> bool:
    """Whether a weight is a tensor of another library, which operators cannot read; torch's own know what to do."""
    return type(weight).__module__.split(".")[0] != "torch"
