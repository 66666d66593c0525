"""Changing the subnetworks of an attached model: another one for a language, a language more or less, or all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.models.attach import Attached, attached, owner_of
from fastmask.models.experts import AttachedExperts
from fastmask.models.layers import Around, AttachedLinear, check_geometry
from fastmask.models.structure import kept_of
from fastmask.subnetworks.subnetworks import Subnetworks

Masked = AttachedLinear | AttachedExperts | Around


def set_subnetwork(model: nn.Module, language: str, heads: Tensor | None = None, neurons: Tensor | None = None) -> None:
    """Give one language of an attached model another subnetwork; those of the other languages stay as they are.

    Only layers where the language's units really change get new masks. `attached(model).subnets` becomes a new object;
    whoever held the old one still has the old masks. Call it between a backward pass and the next forward pass (one
    that was begun before ends with the masks it began with, unless gradient checkpointing recomputes it). A compiled
    model may compile again.

    Args:
        model: a model with subnetworks attached.
        language: one of their languages.
        heads: bool [layers, heads], or None to leave them.
        neurons: bool [layers, ffn], or None to leave them.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: a kind of unit that is not masked, another shape or dtype, or a layer left without a live unit.
    """
    state = attached(model)
    row = state.subnets.index(language)
    given = {what: keep for what, keep in (("heads", heads), ("neurons", neurons)) if keep is not None}
    if not given:
        raise ValueError("nothing to set: give heads, neurons or both")
    # Everything that can fail comes before the first change to the model.
    layers = _masked_layers(model)
    wide = state.subnets.units
    changed: dict[Masked, Mask] = {}
    for what, keep in given.items():
        if (before := wide.get(what)) is None:
            raise ValueError(f"the attached subnetworks do not mask {what}: only those that do can be changed")
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != before.shape[1:]:
            was = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(f"expected {what} of {language!r} as a bool tensor {tuple(before.shape[1:])}, given {was}")
        dead = (~keep.any(1)).nonzero().flatten().tolist()
        if dead:
            raise ValueError(f"this would leave {language!r} without live {what} in layer {dead[0]}: keep at least one")
        for index, group in enumerate(state.structure.groups(what)):
            if keep[index, group.units :].any():
                raise ValueError(f"layer {index} has {group.units} {what}, given masks that own one behind those")
            if torch.equal(keep[index].cpu(), before[row, index].cpu()):
                continue
            for name, unit in group.projections.items():
                changed[layers[name]] = layers[name].mask.replaced(row, kept_of(keep[index, : group.units], unit))
        wide[what] = before.clone()
        wide[what][row] = keep
    _change(state, Subnetworks(state.subnets.languages, weights=state.subnets.weights, **wide), changed)


def set_subnetworks(model: nn.Module, subnets: Subnetworks) -> None:
    """Give an attached model other subnetworks over the same units and weights, perhaps of other languages.

    Raises:
        ValueError: they mask something else or units that are not there, or lack the standing language
            (`set_language`); called inside `fastmask.language`. Nothing has changed then.
    """
    state, owner = attached(model), owner_of(model)
    subnets = subnets.map(lambda keep: keep.cpu())
    if (there := _masked_of(state.subnets)) != (given := _masked_of(subnets)):
        raise ValueError(f"the attached subnetworks mask {there}, given others that mask {given}")
    router = state.router
    standing = router.languages[router.standing] if router.standing is not None and router.standing >= 0 else None
    if standing is not None and standing not in subnets.languages:
        raise ValueError(
            f"{standing!r} is the standing language: set another one, or fastmask.set_language(model) for none, before"
        )
    changes = subnets.languages[: len(router.languages)] != router.languages
    if changes and router.default.get() is not None:
        raise ValueError("cannot remove a language inside `with fastmask.language(...)`: ids of others would change")
    check_geometry(owner, subnets, state.structure)
    masks = {name: Mask.weights(keep) for name, keep in (subnets.weights or {}).items()}
    for _, group, units in state.structure.masked(subnets):
        masks |= group.masks(owner, units)
    _change(state, subnets, {layer: masks[name].to(layer.mask.device) for name, layer in _masked_layers(model).items()})


def _masked_of(subnets: Subnetworks) -> dict[str, tuple[int, ...]]:
    """What subnetworks mask, and the sizes of that."""
    return {name: tuple(keep.shape[1:]) for name, keep in {**subnets.units, **(subnets.weights or {})}.items()}


def add_language(model: nn.Module, name: str, subnet: Subnetworks) -> None:
    """Give an attached model one language more, behind the others; their ids and masks stay as they are.

    Args:
        model: a model with subnetworks attached.
        name: of the new language.
        subnet: the masks of its only language, over what the others mask.

    Raises:
        ValueError: a language of that name is there, `subnet` has several, or masks something else; nothing has
            changed then.
    """
    own = subnet.map(lambda keep: keep.cpu()) if isinstance(subnet, Subnetworks) else subnet
    set_subnetworks(model, attached(model).subnets.map(lambda keep: keep.cpu()).append(name, own))


def remove_language(model: nn.Module, name: str) -> None:
    """Take one language off an attached model. The ids of those behind it become one less.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: it is the only one (see `detach`), or the standing one (`set_language`); called inside
            `fastmask.language`.
    """
    subnets = attached(model).subnets
    gone = subnets.index(name)
    rest = subnets.languages[:gone] + subnets.languages[gone + 1 :]
    if not rest:
        raise ValueError(f"{name!r} is the only language: fastmask.detach(model) takes the subnetworks off")
    set_subnetworks(model, subnets.select(rest))


def _change(state: Attached, subnets: Subnetworks, masks: Mapping[Masked, Mask]) -> None:
    for layer, mask in masks.items():
        layer.mask = mask
    state.subnets = subnets
    state.router.rename(subnets.languages)


def _masked_layers(model: nn.Module) -> dict[str, Masked]:
    """What holds the mask of each module, by its name."""
    layers: dict[str, Any] = dict(owner_of(model).named_modules())
    inside = {name: layer for name, layer in layers.items() if isinstance(layer, AttachedLinear | AttachedExperts)}
    return {**inside, **attached(model).around}
