"""Where masked layers stand in a model, and whether they still do: other libraries replace modules and wrap them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from fastmask.models.offloading import hook_of
from fastmask.models.plain import is_foreign, kind_of, obstacle

__all__ = ["Places"]

Modules = dict[str, nn.Module | None]

_TRANSPARENT = ("OptimizedModule", "FullyShardedDataParallel", "CheckpointWrapper")  # they call a layer as it was


class Places:
    """Where the modules that `attach` put into a model stand, and whether they still do.

    Args:
        model: the model that they were put into.
        modules: they, by name.
        around: names of modules that stay, with masks around them.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], around: Collection[str] = ()) -> None:
        self._around = frozenset(around)
        modules = {**modules, **{name: model.get_submodule(name) for name in around}}
        self._root = model._modules  # not the model: a circle would keep its memory until garbage is collected
        self._leaves: dict[str, tuple[Modules, str, nn.Module]] = {}
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            self._leaves[name] = (model.get_submodule(parent)._modules, child, module)
        self._kinds = {name: type(module) for name, module in modules.items()}
        self._linears = [
            (name, module, _stored_shape(module))
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and name not in self._around
        ]
        self._steps = self._steps_down()

    def check(self) -> None:
        """Refuse to go on if a masked layer was replaced or wrapped, or its weight became something else.

        Raises:
            ValueError: names the module, what it is now, and what to do.
        """
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
        """What `detach` takes out, and where it stands: not what others have replaced by something of theirs.

        Args:
            plain: what is put in instead, by name.

        Raises:
            ValueError: a module is wrapped, or others have hung something on it that would be lost.
        """
        found = {}
        for name, (modules, child, layer) in self._leaves.items():
            now = modules.get(child)
            if name in self._around:
                continue
            if now is layer:
                if type(layer) is not self._kinds[name]:
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


def _stored_shape(layer: nn.Linear) -> tuple[int, int]:
    shape = layer.out_features, layer.in_features
    return shape[::-1] if getattr(layer, "transposed", False) else shape


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
