"""The masked layers of a model, built from its linear layers and not yet put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.masks import Mask
from fastmask.models.families import family_of, layer_parts
from fastmask.models.layers import AttachedLinear, Siblings
from fastmask.models.plain import obstacle, plain_linear
from fastmask.models.routing import Router
from fastmask.subnetworks.geometry import Geometry
from fastmask.subnetworks.subnetworks import Subnetworks
from fastmask.torch_path.activations import NONE, name_of

__all__ = ["unit_layers", "weight_layers"]


def unit_layers(model: nn.Module, subnets: Subnetworks, router: Router) -> dict[str, nn.Module]:
    """The layers of heads and neurons, by module name, and identities for activations that they take over.

    They are packed, unless the router says that the forward pass is that of the full network: that computes activations
    as the plain model does, once.
    """
    if subnets.heads is None and subnets.neurons is None:
        return {}
    family_of(model)  # an unsupported model gets an error that names the supported ones, not a missing attribute
    _check_geometry(model, subnets)
    layers: dict[str, nn.Module] = {}

    def add(side: str, units: Mapping[str, int], keep: Tensor, **options: Any) -> None:
        linears = {name: plain_linear(model, name) for name in units}
        if len(linears) > 1 and len({linear.bias is not None for linear in linears.values()}) == 1:
            options["siblings"] = Siblings()  # they read the same input, and are computed together
        for name, linear in linears.items():
            build, other = (Mask.rows, linear.in_features) if side == "rows" else (Mask.columns, linear.out_features)
            mask = build(keep.repeat_interleave(units[name], 1), other)
            unit = None if router.full_forward else units[name]
            layers[name] = AttachedLinear.from_linear(linear, mask, router=router, packed_unit=unit, **options)

    for index, parts in enumerate(layer_parts(model)):
        if subnets.heads is not None:
            add("rows", parts.heads_rows, subnets.heads[:, index], of_heads=True)
            add("columns", dict([parts.heads_columns]), subnets.heads[:, index], of_heads=True)
        if subnets.neurons is not None:
            activation = NONE
            if parts.activation is not None and not router.full_forward:
                activation = name_of(model.get_submodule(parts.activation))
                if activation != NONE:
                    if why := obstacle(model.get_submodule(parts.activation)):
                        raise ValueError(f"cannot compute {parts.activation!r} in the layer behind it: {why}")
                    layers[parts.activation] = nn.Identity()
            add("rows", dict.fromkeys(parts.neurons_rows, 1), subnets.neurons[:, index])
            add("columns", {parts.neurons_columns: 1}, subnets.neurons[:, index], activation=activation)
    return layers


def weight_layers(model: nn.Module, subnets: Subnetworks, router: Router) -> dict[str, AttachedLinear]:
    """The layers with a mask over single weights, by module name."""
    layers = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, keep in (subnets.weights or {}).items():
        if name not in modules:
            raise unknown("linear layer", name, [n for n, module in modules.items() if isinstance(module, nn.Linear)])
        linear = plain_linear(model, name)
        expected = (len(subnets.languages), linear.out_features, linear.in_features)
        if tuple(keep.shape) != expected:
            raise ValueError(f"the mask of {name!r} has shape {tuple(keep.shape)}, expected {expected}")
        layers[name] = AttachedLinear.from_linear(linear, Mask.weights(keep), router=router, packed_unit=None)
    if subnets.heads is not None or subnets.neurons is not None:
        taken = [name for name in layers if name in _unit_names(model, subnets)]
        if taken:
            raise ValueError(f"{taken[0]!r} has a mask over weights and one over heads or neurons: give one of the two")
    return layers


def _unit_names(model: nn.Module, subnets: Subnetworks) -> set[str]:
    names: set[str] = set()
    for parts in layer_parts(model):
        if subnets.heads is not None:
            names |= {*parts.heads_rows, parts.heads_columns[0]}
        if subnets.neurons is not None:
            names |= {*parts.neurons_rows, parts.neurons_columns}
    return names


def _check_geometry(model: nn.Module, subnets: Subnetworks) -> None:
    geometry = Geometry.of(model.config)
    for what, keep, size in (
        ("heads", subnets.heads, geometry.heads),
        ("neurons", subnets.neurons, geometry.neurons),
    ):
        if keep is not None and tuple(keep.shape[1:]) != (geometry.layers, size):
            raise ValueError(
                f"the masks are for {keep.shape[1]} layers of {keep.shape[2]} {what}, "
                f"this {type(model).__name__} has {geometry.layers} layers of {size} {what}"
            )
