"""The heads and neurons of a model, found by the names and shapes of its modules.

The order is that of the modules in the model: an encoder-decoder has the attentions of its encoder first, then each
decoder layer's own attention and its attention to the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.models.experts import Stacked, stacked_in
from fastmask.models.families import Family, Projections, family_of

if TYPE_CHECKING:
    from fastmask.subnetworks.subnetworks import Subnetworks

# Modules whose projections look like those of an FFN and are something else: a router's scores choose experts, and
# tokens inside of one expert have lost which example they belong to (experts in one module are told by `stacked_in`).
_NOT_OURS = re.compile(r"(^|\.)(router\w*|gate|experts\.\d+|\w*norm\w*|\w*adapter\w*|\w*projector)(\.|$)")
_HEAD_SIZES = (
    "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head", "attn_head_size", "d_head",
    "dim_head",
)  # fmt: skip
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")


@dataclass(frozen=True)
class UnitGroup:
    """The heads of one attention, or the neurons of one FFN, or of the experts of one layer.

    Query heads that read one key/value head are one unit, unless the layout names no projections of keys and values.
    """

    kind: str  # "heads" or "neurons"
    name: str  # of the module that holds the projections
    units: int  # how many there are
    # How many output rows of each projection one unit takes. Several numbers are of a projection that computes several
    # things one after the other (all queries, all keys, all values).
    rows: dict[str, tuple[int, ...]]
    columns: tuple[str, int]  # the projection that reads the units, and how many input columns one unit takes
    activation: str | None = None  # the module between, if it stands alone
    stacked: tuple[Stacked, ...] = ()  # of experts, the parameters of `columns[0]` with their neurons; no `rows` then

    @property
    def projections(self) -> dict[str, tuple[int, ...]]:
        """`rows` and `columns` together: how many rows or columns of each projection one unit takes."""
        name, of_unit = self.columns
        return {**self.rows, name: (of_unit,)}

    @property
    def place(self) -> str:
        """What groups of one sort have in common: the kind, and the name without numbers."""
        return f"{self.kind} of {re.sub(r'[.][0-9]+(?=[.]|$)', '.*', self.name)}"

    def masks(self, model: nn.Module, keep: Tensor) -> dict[str, Mask]:
        """The mask of each projection, by module name, of the units that live: bool [L, units]."""
        if self.stacked:
            return {self.name: Mask.columns(keep, 1)}
        masks: dict[str, Mask] = {}
        for name, unit in self.projections.items():
            out, into = sizes_of(model.get_submodule(name))  # type: ignore[misc]
            flags = kept_of(keep, unit)
            masks[name] = Mask.rows(flags, into) if name in self.rows else Mask.columns(flags, out)
        return masks


@dataclass(frozen=True)
class Structure:
    """All attentions and FFNs of a model whose units can be masked, in order.

    The routed experts of a layer count as one FFN, of as many neurons as each of them has. What can be switched off on
    its own counts as a head: attention heads, or key/value groups under grouped-query attention (a key head and all
    query heads that read it), or single query heads (see `Projections`).
    """

    attentions: tuple[UnitGroup, ...]
    ffns: tuple[UnitGroup, ...]

    @cached_property
    def one_stack(self) -> bool:
        """Whether it is one stack of layers with an attention each, all of as many heads, as a cache has."""
        return len({(group.place, group.units) for group in self.attentions}) == 1

    def groups(self, kind: str) -> tuple[UnitGroup, ...]:
        """Those of "heads" or of "neurons"."""
        return self.attentions if kind == "heads" else self.ffns

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Units of each attention ("heads") or FFN ("neurons"), as `Subnetworks.heads` and `.neurons` have places.

        Those are as wide as the widest: where one has fewer units, the last do not exist, and no language owns them.

        Raises:
            ValueError: the model has none.
        """
        if not (groups := self.groups(kind)):
            raise ValueError(f"this model has no {kind} that fastmask knows how to mask")
        return tuple(group.units for group in groups)

    def masked(self, subnets: Subnetworks) -> Iterator[tuple[int, UnitGroup, Tensor]]:
        """Every group that has masks: its number among those of its kind, itself, and its units, bool [L, units]."""
        for kind, keep in subnets.units.items():
            for index, group in enumerate(self.groups(kind)):
                yield index, group, keep[:, index, : group.units]


def structure_of(model: Any, family: Family | None = None) -> Structure:
    """Find the attentions and FFNs of a model, plain or attached, by the layouts of a family, or all that are known.

    Of a Hugging Face config the bare model is built, without memory.

    Raises:
        ValueError: neither a model nor a config, or nothing of a known layout in it.
    """
    if not isinstance(model, nn.Module):
        if not hasattr(model, "model_type"):
            raise ValueError(f"expected a model or its Hugging Face config, given {type(model).__name__}")
        from transformers import AutoModel  # not at the top: whoever has a config has imported it already

        with torch.device("meta"):
            model = AutoModel.from_config(model)
    looked_for = family_of(model) if family is None else family
    attentions = tuple(_found(model, looked_for.attention, "heads"))
    ffns = tuple(_found(model, looked_for.ffn, "neurons"))
    if not attentions and not ffns:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        kind = f" (model type {model_type!r})" if model_type else ""
        raise ValueError(
            f"cannot attach to {type(model).__name__}{kind}: it has no attention and no FFN of a known layout. Say "
            "where they are: attach(model, subnets, family=fastmask.Family(...))"
        )
    return Structure(attentions, ffns)


def layers_of(model: nn.Module, structure: Structure) -> list[nn.Module]:
    """The Transformer layers that hold the attentions, in order; one list for all stacks."""
    names = [re.match(r".*?[.][0-9]+(?=[.]|$)", group.name) for group in structure.attentions or structure.ffns]
    return [model.get_submodule(name) for name in dict.fromkeys(found[0] for found in names if found)]


def kept_of(keep: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Flags of a projection's output rows, bool [..., out], from those of units, [..., units]."""
    return torch.cat([keep.repeat_interleave(of_part, -1) for of_part in unit], -1)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is stored [in, out]. By name, as importing it takes seconds."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def sizes_of(linear: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of anything that works as a linear layer; None for anything else."""
    linear = getattr(linear, "base_layer", linear)  # below an adapter
    if is_conv1d(linear):
        weight: Any = linear.weight
        return weight.shape[1], weight.shape[0]
    sizes = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    return sizes if all(type(size) is int for size in sizes) else None  # type: ignore[return-value]


_Measured = tuple[int, list[tuple[int, ...]]] | None  # how many units, and how many rows of each projection one takes


def _found(model: nn.Module, layouts: Sequence[Projections], kind: str) -> Iterator[UnitGroup]:
    taken: set[str] = set()
    for name, module in model.named_modules():
        # Units are those of a stack of layers: a task head may have projections of the same names.
        layer = re.search(r"[.][0-9]+(?=[.]|$)", name)
        if layer is None or _NOT_OURS.search(name[layer.end() :]):
            continue
        for layout in layouts:
            if kind == "neurons" and (experts := stacked_in(module, layout)) is not None:
                units, stacked = experts
                yield UnitGroup(kind, name, units, {}, (name, 1), stacked=stacked)
                break
            parts = [_below(module, part) for part in (*layout.rows, layout.columns)]
            sizes = [found for part in parts if part is not None and (found := sizes_of(part)) is not None]
            names = [f"{name}.{part}" for part in layout.rows]
            if len(sizes) < len(parts) or taken.intersection(names):
                continue
            outs, width = [out for out, _ in sizes[:-1]], sizes[-1][1]
            measured = _heads(model, module, layout, outs, width) if kind == "heads" else _neurons(outs, width)
            if measured is None:
                continue
            units, rows = measured
            taken.update(names)
            columns, own = (f"{name}.{layout.columns}", width // units), layout.activation
            activation = f"{name}.{own}" if own is not None and _below(module, own) is not None else None
            yield UnitGroup(kind, name, units, dict(zip(names, rows, strict=True)), columns, activation)
            break


def _below(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


def _neurons(outs: list[int], width: int) -> _Measured:
    if all(out == width for out in outs):
        return width, [(1,)] * len(outs)
    return (width, [(1, 1)]) if outs == [2 * width] else None  # gate and up in one


def _heads(model: nn.Module, holder: nn.Module, layout: Projections, outs: list[int], width: int) -> _Measured:
    # Of the attention, of what is in it, of a config.
    places = [*holder.modules(), getattr(holder, "config", None), getattr(model, "config", None)]
    size, count = number_in(places, _HEAD_SIZES), number_in(places, _HEAD_COUNTS)
    if any(isinstance(child, nn.Conv1d) for child in holder.children()):
        return None  # linear attention over a state, whose heads are no units of these projections
    if len(outs) == 2:  # latent attention: every head has keys and values of its own
        units = count
    else:
        if not size and count:
            size = width // count
        if not size:
            raise ValueError(
                f"a {type(holder).__name__} does not say how many heads it has: expected an attribute "
                f"{', '.join(_HEAD_SIZES[:3])} or {', '.join(_HEAD_COUNTS[:2])} of it or of its config"
            )
        if not layout.fused and outs == [width]:  # queries alone
            units = width // size
        else:  # several query heads may read one key: those are one unit
            units = outs[1] // size if len(outs) == 3 else (outs[0] // size - width // size) // 2
    if not units or any(out % units for out in outs) or width % units:
        return None
    if layout.fused == "parts":
        key = (outs[0] - width) // 2
        return (units, [(width // units, key // units, key // units)]) if key > 0 and key % units == 0 else None
    return units, [(out // units,) for out in outs]


def number_in(places: Iterable[Any], names: Sequence[str]) -> int:
    """The first of some attributes that is a number, in the first of some places that has one; otherwise 0."""
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if type(value) is int and value > 0:
                return value
    return 0
