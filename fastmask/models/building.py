"""The masked layers of a model, built from its linear layers and not yet put in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.masks import Mask
from fastmask.models.around import Around, is_wrapped
from fastmask.models.expert_layer import AttachedExperts
from fastmask.models.layers import AttachedConv1D, AttachedLinear, Siblings
from fastmask.models.plain import obstacle, plain_experts, plain_linear
from fastmask.models.routing import Router
from fastmask.models.structure import Structure, UnitGroup, is_conv1d, sizes_of
from fastmask.subnetworks.subnetworks import Subnetworks
from fastmask.torch_path.layers import NONE, name_of

__all__ = ["Layers", "kept_of", "masks_of", "put", "unit_layers", "weight_layers", "wrapped_in"]

Layers = dict[str, nn.Module | Around]
"""What `attach` puts into a model, by the name of the module whose place it takes, or around which it is put."""


def unit_layers(
    model: nn.Module,
    subnets: Subnetworks,
    router: Router,
    structure: Structure,
    unpacked: Collection[str] = (),
    apart: Collection[str] = (),
) -> Layers:
    """The layers of heads and neurons, by module name, and identities for activations that they take over.

    Adapters and quantised layers stay where they are, with masks around them.

    Args:
        model: plain.
        subnets: masks for its geometry.
        router: where the layers will look up their languages.
        structure: of the model.
        unpacked: places (`UnitGroup.place`) whose units stay in their slots.
        apart: places whose projections do not read the same input.
    """
    _check_geometry(model, subnets, structure)
    layers: Layers = {}
    for _, group, keep in structure.masked(subnets):
        how = {"router": router, "packs": group.place not in unpacked, "of_heads": group.kind == "heads"}
        layers |= _of_group(model, group, keep, group.place not in apart, how)
    return layers


def _of_group(model: nn.Module, group: UnitGroup, keep: Tensor, together: bool, options: dict[str, Any]) -> Layers:
    """The layers of the heads of one attention, or of the neurons of one FFN; keep: bool [L, units]."""
    if group.stacked:
        ((name, mask),) = masks_of(model, group, keep).items()
        packs = options["packs"]
        return {name: AttachedExperts(plain_experts(model, name), mask, group.stacked, options["router"], packs)}
    layers: Layers = {}
    full, wrapped = options["router"].full_forward, wrapped_in(model, group)
    if full and wrapped:
        raise ValueError(
            f'forward="full" needs the weights that learn, and {wrapped!r} is an adapter or a quantised layer: merge '
            "adapters first (`merge_and_unload()`)"
        )
    if full or wrapped:
        options = {**options, "packs": False}
    linears = {name: _linear(model, name) for name in group.rows}
    fused = any(len(unit) > 1 for unit in group.rows.values())
    alike = len({(getattr(linear, "bias", None) is not None, _width(linear)) for linear in linears.values()}) == 1
    alike = alike and not any(is_wrapped(linear) for linear in linears.values())
    siblings = Siblings() if together and len(linears) > 1 and alike and not fused else None
    masks = masks_of(model, group, keep)
    for name, unit in group.rows.items():
        parts = [(of_part * group.units, of_part) for of_part in unit] if len(unit) > 1 else []
        layers[name] = _layer(linears[name], masks[name], unit=sum(unit), parts=parts, siblings=siblings, **options)
    name, of_unit = group.columns
    linear, activation = _linear(model, name), NONE
    # Where the full network runs, the model computes activations itself, once.
    if group.activation is not None and not full and not is_wrapped(linear):
        activation = name_of(model.get_submodule(group.activation))
        if activation != NONE:
            if why := obstacle(model.get_submodule(group.activation)):
                raise ValueError(f"cannot compute {group.activation!r} in the layer behind it: {why}")
            layers[group.activation] = nn.Identity()
    layers[name] = _layer(linear, masks[name], unit=of_unit, activation=activation, **options)
    return layers


def masks_of(model: nn.Module, group: UnitGroup, keep: Tensor) -> dict[str, Mask]:
    """The mask of each projection of a group, by module name.

    Args:
        model: plain or attached.
        group: of its structure.
        keep: which units live, bool [L, units].
    """
    if group.stacked:
        return {group.name: Mask.columns(keep, 1)}
    masks: dict[str, Mask] = {}
    for name, unit in group.projections.items():
        projection, flags = model.get_submodule(name), kept_of(keep, unit)
        of_rows = name in group.rows
        masks[name] = Mask.rows(flags, _width(projection)) if of_rows else Mask.columns(flags, _height(projection))
    return masks


def put(model: nn.Module, layers: Mapping[str, nn.Module | Around]) -> Layers:
    """Put layers into a model, and masks around its modules; returns the modules that stood there."""
    before: Layers = {}
    for name, layer in layers.items():
        if isinstance(layer, Around):
            layer.put(model.get_submodule(name))
        else:
            parent, _, child = name.rpartition(".")
            children = model.get_submodule(parent)._modules
            before[name], children[child] = children[child], layer  # type: ignore[assignment]
    return before


def kept_of(keep: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Flags of a projection's output rows, bool [..., out], from those of units, [..., units]."""
    return torch.cat([keep.repeat_interleave(of_part, -1) for of_part in unit], -1)


def wrapped_in(model: nn.Module, group: UnitGroup) -> str | None:
    """The first projection of a group that is an adapter or quantised, if one is."""
    return next((name for name in group.projections if is_wrapped(model.get_submodule(name))), None)


def _linear(model: nn.Module, name: str) -> Any:
    module = model.get_submodule(name)
    return module if is_wrapped(module) else plain_linear(model, name)


def _layer(linear: nn.Module, mask: Mask, **options: Any) -> AttachedLinear | Around:
    if is_wrapped(linear):
        return Around(mask, options["router"])
    kind = AttachedConv1D if is_conv1d(linear) else AttachedLinear
    return kind.from_linear(linear, mask, **options)  # type: ignore[arg-type]


def _width(linear: nn.Module) -> int:
    return sizes_of(linear)[1]  # type: ignore[index]


def _height(linear: nn.Module) -> int:
    return sizes_of(linear)[0]  # type: ignore[index]


def weight_layers(model: nn.Module, subnets: Subnetworks, router: Router, taken: Collection[str]) -> Layers:
    """The layers with a mask over single weights, by module name.

    Args:
        model: plain.
        subnets: the masks.
        router: where the layers will look up their languages.
        taken: the modules with a mask over heads or neurons.
    """
    layers: Layers = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, keep in (subnets.weights or {}).items():
        if name not in modules:
            raise unknown("linear layer", name, [n for n, module in modules.items() if isinstance(module, nn.Linear)])
        linear = plain_linear(model, name)
        expected = (len(subnets.languages), _height(linear), _width(linear))
        if tuple(keep.shape) != expected:
            raise ValueError(f"the mask of {name!r} has shape {tuple(keep.shape)}, expected {expected}")
        if name in taken:
            raise ValueError(f"{name!r} has a mask over weights and one over heads or neurons: give one of the two")
        layers[name] = _layer(linear, Mask.weights(keep), router=router, unit=None)
    return layers


def _check_geometry(model: nn.Module, subnets: Subnetworks, structure: Structure) -> None:
    what = f"this {type(model).__name__} has"
    for kind, keep in (("heads", subnets.heads), ("neurons", subnets.neurons)):
        if keep is None:
            continue
        sizes = [group.units for group in structure.groups(kind)]
        if not sizes:
            raise ValueError(f"the masks are for {kind}, and {what} none that fastmask knows how to mask")
        if tuple(keep.shape[1:]) != (len(sizes), max(sizes)):
            raise ValueError(
                f"the masks are for {keep.shape[1]} layers of {keep.shape[2]} {kind}, "
                f"{what} {len(sizes)} layers of {max(sizes)} {kind}"
            )
        for index, group in enumerate(structure.groups(kind)):
            if keep[:, index, group.units :].any():
                raise ValueError(
                    f"the masks own {kind} of layer {index} that do not exist: {what} {group.units} there "
                    f"({group.name})"
                )
