"""What `attach` puts into a model: masked layers, which read their languages from the model's router.

Layers that share their input (Q, K and V; gate and up) are `Siblings`: whichever the model calls first computes all.
One layer that holds several projections (fused QKV, gate-up) computes them side by side: its `parts`. Modules that are
more than linear layers (LoRA of PEFT, quantised weights) run as they are, with masks `Around` them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.linear import MaskedLinear
from fastmask.masks import UNPACKED, Mask
from fastmask.models.experts import AttachedExperts
from fastmask.models.other_libraries import is_wrapped, obstacle, plain_experts, plain_linear
from fastmask.models.routing import Route, Router
from fastmask.models.structure import Structure, UnitGroup, is_conv1d, sizes_of
from fastmask.operators import packing_pays, run
from fastmask.subnetworks.subnetworks import Subnetworks
from fastmask.torch_path.layers import NONE, Layers, name_of


class AttachedLinear(MaskedLinear):
    """A `MaskedLinear` that looks like the `nn.Linear` it replaces.

    With `packs` it works packed, unless its units are `spread` in a pass (`Route`): a row mask puts each example's live
    heads (or neurons) at the front of an output as wide as the widest language of the batch, and a column mask reads
    such an input. The attention code in between reshapes with -1 heads and so needs no change; a slot that is left over
    is a head of zeros, which adds nothing.

    Args:
        unit: rows or columns of one head (or neuron); the packed width is a multiple of it and holds at least one unit,
            because attention code cannot reshape zero heads. None for a mask that is not over units.
        packs: whether live units may be packed; otherwise each stays in its slot, and dead ones are zeros.
        of_heads: whether the units are heads, which a route may want unpacked.
        once: whether the model also runs the layer on one example that the whole batch reads (`Route.examples`).
        parts: output rows of each of several projections that the weight holds, and of a unit in each; () for one.
        activation: a name of `torch_path.layers`, applied to the input in place of the model's own.
        siblings: the layers that are called with the same input, if there are some.
        between: says whether units are packed in a pass, to the projections that make them and the one that reads them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        *,
        router: Router,
        unit: int | None,
        packs: bool = True,
        of_heads: bool = False,
        once: bool = False,
        parts: Sequence[tuple[int, int]] = (),
        activation: str = NONE,
        siblings: Siblings | None = None,
        between: Between | None = None,
        **options: Any,
    ) -> None:
        self.parts = tuple(parts)
        forward = "full" if router.full_forward else "masked"
        super().__init__(in_features, out_features, mask, forward=forward, **options)
        self.router, self.unit, self.packs, self.of_heads = router, unit, packs and unit is not None, of_heads
        self.activation, self.siblings, self.between, self.once = activation, siblings, between, once
        if siblings is not None:
            siblings.layers.append(self)

    def _follow_mask(self) -> None:
        # What lives is counted here, and not in a pass: a tracer cannot, and on a GPU it would wait.
        if self._mask.extents.is_meta:  # moved to where nothing has values: what was counted before holds
            return
        self._counts = self._mask.live_counts() if self._mask.kind in ("rows", "columns") else []
        self._of_parts: list[tuple[Mask, list[int]]] = []
        if self.parts:
            keep = self._mask.flags().split([size for size, _ in self.parts], 1)
            masks = [Mask.rows(of_part, self.in_features) for of_part in keep]
            self._of_parts = [(of_part, of_part.live_counts()) for of_part in masks]

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in or packed in] -> [B, ..., out or packed out]."""
        route, siblings = self.router.current(), self.siblings
        if siblings is not None and route.shared and (siblings in route.waiting or not siblings.come_one_by_one(x)):
            return siblings.output_of(self, x, route)
        if self.between is not None and siblings is None and self._mask.kind == "rows":
            self.between.choose([self], x, route)
        if self.parts and self.packs_in(route):
            return self._parts_side_by_side(x, route)
        layers = Layers([self.mask], [self.packed_width(route, x)], self.activation, self.full_forward)
        (examples, ids), bias = route.examples(x, self.once), self.bias
        return route.joined(run(layers, examples, [self.matrix], [] if bias is None else [bias], ids)[0])

    def packs_in(self, route: Route) -> bool:
        """Whether live units travel packed in a pass."""
        if route.spread and self.between in route.spread:
            return False
        return self.packs and (route.packs_heads or not self.of_heads)

    def packed_width(self, route: Route, x: Tensor) -> int:
        """Width of the packed side: that of the input, or of the widest language present, or of all if not known."""
        if not self.packs_in(route):
            return UNPACKED
        if self._mask.kind == "columns":
            return x.shape[-1]
        assert self.unit is not None
        return self._widest(self._counts, route, x, self.out_features, self.unit)

    @staticmethod
    def _widest(counts: list[int], route: Route, x: Tensor, full: int, unit: int) -> int:
        if route.present is None:
            widest = max(counts)
        elif -1 in route.present:
            return full
        else:
            widest = max([0, *[counts[language] for language in route.present]])
        if unit == 1 and x.is_cuda:
            # Rows that begin at a multiple of 16 bytes are copied 16 bytes at a time.
            widest = min(-(-widest // 64) * 64, full)
        return max(widest, unit)

    def _parts_side_by_side(self, x: Tensor, route: Route) -> Tensor:
        """Each part packed by itself: [queries | keys | values] with as many units of each."""
        sizes = [size for size, _ in self.parts]
        masks = [self._beside_weight(mask) for mask, _ in self._of_parts]
        both = zip(self._of_parts, self.parts, strict=True)
        widths = [self._widest(counts, route, x, size, unit) for (_, counts), (size, unit) in both]
        biases = [] if self.bias is None else list(self.bias.split(sizes))
        weights, (examples, ids) = list(self.matrix.split(sizes)), route.examples(x)
        return route.joined(torch.cat(list(run(Layers(masks, widths), examples, weights, biases, ids)), -1))


class AttachedConv1D(AttachedLinear):
    """An `AttachedLinear` in the place of GPT-2's `Conv1D`, whose weight is stored transposed, [in, out]."""

    transposed = True
    _stored: tuple[Mask, Mask] | None = None  # a mask, and the same over [in, out]

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        # The kernels read rows that lie together.
        return self.weight.t().contiguous() if self.weight.is_cuda else self.weight.t()

    @property
    def stored_mask(self) -> Mask:
        """The mask over [in, out]: of rows one over columns, and the other way round."""
        mask = self.mask
        if self._stored is None or self._stored[0] is not mask:
            self._stored = mask, mask.transposed()
        return self._stored[1]


class Between:
    """What lies between projections that are called with one input and the one that consumes their units."""

    def choose(self, layers: Sequence[AttachedLinear], x: Tensor, route: Route) -> None:
        """Whether the units are packed in a pass, as the projections' input x says: the consumer follows."""
        if route.spread is None or not layers[0].packs or not x.is_cpu:
            return
        examples, ids = route.examples(x)
        if packing_pays([layer.mask for layer in layers], examples, ids):
            route.spread.discard(self)
        else:
            route.spread.add(self)


class Siblings:
    """Row-masked layers that a model calls with one input, one after the other.

    The first that is called computes the outputs of all, and the others hand theirs out. An output is only handed out
    for the very tensor, the route and the gradient mode it was computed for; anything else is computed afresh.
    """

    def __init__(self) -> None:
        self.layers: list[AttachedLinear] = []

    def come_one_by_one(self, x: Tensor) -> bool:
        """Whether accelerate offloads their weights, and brings back only that of the layer that is called."""
        if x.is_meta:
            return False
        weights = [layer._parameters.get("weight") for layer in self.layers]
        return any([weight is not None and weight.is_meta for weight in weights])

    def output_of(self, layer: AttachedLinear, x: Tensor, route: Route) -> Tensor:
        """The output of one of the layers for x [B, ..., in]."""
        # Counts writes to x. A tracer has no versions and shows writes as new tensors; tensors of inference mode have
        # none either: a model that wrote to the input between its projections would go unnoticed there.
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        layers, me, now = self.layers, self.layers.index(layer), (version, torch.is_grad_enabled())
        of, then, left = route.waiting.get(self, (None, None, {}))
        if of is not x or then != now or me not in left:
            if layer.between is not None:
                layer.between.choose(layers, x, route)
            examples, ids = route.examples(x)
            masks, widths = [each.mask for each in layers], [each.packed_width(route, x) for each in layers]
            weights, biases = [each.matrix for each in layers], [each.bias for each in layers]  # all have one, or none
            biases = [] if biases[0] is None else biases
            ys = run(Layers(masks, widths, NONE, layer.full_forward), examples, weights, biases, ids)
            left = dict(enumerate(map(route.joined, ys)))
            route.waiting[self] = x, now, left
        y: Tensor = left.pop(me)
        if not left:
            del route.waiting[self]
        return y


class Around:
    """The masks of a module's rows (put on its output) or columns (on its input), as hooks.

    Masking whole rows of a weight is masking its outputs, masking columns its inputs, whatever the weight is made of:
    exact, at dense cost, and adapters are masked with the weight that they are added to.
    """

    def __init__(self, mask: Mask, router: Router, once: bool = False) -> None:
        self.mask, self.router, self.once = mask, router, once
        self._handle: Any = None

    @property
    def mask(self) -> Mask:
        """The mask; it may be replaced."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._mask = mask
        dead = ~mask.flags()
        self._dead = torch.cat([dead, torch.zeros_like(dead[:1])])  # the last one is the full network's, -1

    def put(self, module: nn.Module) -> None:
        if self.mask.kind == "rows":
            self._handle = module.register_forward_hook(self._of_output)
        else:
            self._handle = module.register_forward_pre_hook(self._of_input)

    def take_off(self) -> None:
        self._handle.remove()

    def _of_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._masked(output)

    def _of_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._masked(args[0]), *args[1:])

    def _masked(self, x: Tensor) -> Tensor:
        if self._dead.device != x.device:
            self._dead = self._dead.to(x.device)
        route = self.router.current()
        examples, ids = route.examples(x, self.once)
        dead = self._dead[ids].view(examples.shape[0], *[1] * (examples.ndim - 2), -1)
        return route.joined(examples.masked_fill(dead, 0))


# ---- making them of the modules of a model, and putting them in


Placed = dict[str, nn.Module | Around]
"""What `attach` puts into a model, by the name of the module whose place it takes, or around which it is put."""


def unit_layers(
    model: nn.Module,
    subnets: Subnetworks,
    router: Router,
    structure: Structure,
    unpacked: Collection[str] = (),
    apart: Collection[str] = (),
    once: Collection[str] = (),
) -> Placed:
    """The layers of heads and neurons, by module name, and identities for activations that they take over.

    At places (`UnitGroup.place`) that are `unpacked` units stay in their slots, at those `apart` projections do not
    read the same input, and at those in `once` they also run on something that all examples read.
    """
    check_geometry(model, subnets, structure)
    layers: Placed = {}
    for _, group, keep in structure.masked(subnets):
        how = {"router": router, "packs": group.place not in unpacked, "of_heads": group.kind == "heads"}
        how["once"] = group.place in once
        layers |= _of_group(model, group, keep, group.place not in apart, how)
    return layers


def _of_group(model: nn.Module, group: UnitGroup, keep: Tensor, together: bool, options: dict[str, Any]) -> Placed:
    """The layers of the heads of one attention, or of the neurons of one FFN; keep: bool [L, units]."""
    if group.stacked:
        plain, mask = plain_experts(model, group.name), group.masks(model, keep)[group.name]
        return {group.name: AttachedExperts(plain, mask, group.stacked, options["router"], options["packs"])}
    layers: Placed = {}
    full, wrapped = options["router"].full_forward, wrapped_in(model, group)
    if full and wrapped:
        raise ValueError(
            f'forward="full" needs the weights that learn, and {wrapped!r} is an adapter or a quantised layer: merge '
            "adapters first (`merge_and_unload()`)"
        )
    if full or wrapped:
        options = {**options, "packs": False}
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in group.projections}
    linears = {name: each if is_wrapped(each) else plain_linear(model, name) for name, each in linears.items()}
    masks, siblings = group.masks(model, keep), None
    if together and len(group.rows) > 1 and not any(is_wrapped(linears[name]) for name in group.rows):
        alike = {(linears[name].bias is not None, masks[name].in_features) for name in group.rows}
        fused = any(len(unit) > 1 for unit in group.rows.values())
        siblings = Siblings() if len(alike) == 1 and not fused else None
    # Projections that are computed apart could choose differently.
    options = {**options, "between": Between() if siblings is not None or len(group.rows) == 1 else None}
    for name, unit in group.rows.items():
        parts = [(of_part * group.units, of_part) for of_part in unit] if len(unit) > 1 else []
        layers[name] = _layer(linears[name], masks[name], unit=sum(unit), parts=parts, siblings=siblings, **options)
    name, of_unit = group.columns
    activation = NONE
    # Where the full network runs, the model computes activations itself, once.
    if group.activation is not None and not full and not is_wrapped(linears[name]):
        activation = name_of(model.get_submodule(group.activation))
        if activation != NONE:
            if why := obstacle(model.get_submodule(group.activation)):
                raise ValueError(f"cannot compute {group.activation!r} in the layer behind it: {why}")
            layers[group.activation] = nn.Identity()
    layers[name] = _layer(linears[name], masks[name], unit=of_unit, activation=activation, **options)
    return layers


def weight_layers(model: nn.Module, subnets: Subnetworks, router: Router, taken: Collection[str]) -> Placed:
    """The layers with a mask over single weights, by module name; `taken` have one over heads or neurons."""
    layers: Placed = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, keep in (subnets.weights or {}).items():
        if name not in modules:
            raise unknown("linear layer", name, [n for n, module in modules.items() if isinstance(module, nn.Linear)])
        linear = plain_linear(model, name)
        expected = (len(subnets.languages), *sizes_of(linear))  # type: ignore[misc]
        if tuple(keep.shape) != expected:
            raise ValueError(f"the mask of {name!r} has shape {tuple(keep.shape)}, expected {expected}")
        if name in taken:
            raise ValueError(f"{name!r} has a mask over weights and one over heads or neurons: give one of the two")
        layers[name] = _layer(linear, Mask.weights(keep), router=router, unit=None)
    return layers


def _layer(linear: nn.Module, mask: Mask, **options: Any) -> AttachedLinear | Around:
    if is_wrapped(linear):
        return Around(mask, options["router"], options.get("once", False))
    kind = AttachedConv1D if is_conv1d(linear) else AttachedLinear
    return kind.from_linear(linear, mask, **options)  # type: ignore[arg-type]


def wrapped_in(model: nn.Module, group: UnitGroup) -> str | None:
    """The first projection of a group that is an adapter or quantised, if one is."""
    return next((name for name in group.projections if is_wrapped(model.get_submodule(name))), None)


def put(model: nn.Module, layers: Mapping[str, nn.Module | Around]) -> Placed:
    """Put layers into a model, and masks around its modules; returns the modules that stood there."""
    before: Placed = {}
    for name, layer in layers.items():
        if isinstance(layer, Around):
            layer.put(model.get_submodule(name))
        else:
            parent, _, child = name.rpartition(".")
            children = model.get_submodule(parent)._modules
            before[name], children[child] = children[child], layer  # type: ignore[assignment]
    return before


def check_geometry(model: nn.Module, subnets: Subnetworks, structure: Structure) -> None:
    """Raise ValueError where masks are of units that a model does not have."""
    what = f"this {type(model).__name__} has"
    for kind, keep in subnets.units.items():
        sizes = [group.units for group in structure.groups(kind)]
        if not sizes:
            raise ValueError(f"the masks are for {kind}, and {what} none that fastmask knows how to mask")
        if tuple(keep.shape[1:]) != (len(sizes), max(sizes)):
            there = f"{what} {len(sizes)} layers of {max(sizes)} {kind}"
            raise ValueError(f"the masks are for {keep.shape[1]} layers of {keep.shape[2]} {kind}, {there}")
        for index, group in enumerate(structure.groups(kind)):
            if keep[:, index, group.units :].any():
                there = f"{what} {group.units} there ({group.name})"
                raise ValueError(f"the masks own {kind} of layer {index} that do not exist: {there}")
