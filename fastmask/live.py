"""`Live`: what of a weight some languages own, in one form for masks of every kind.

A mask divides a weight [N, K] into cells that live or die as one: rows (1, K), columns (N, unit), blocks (bn, bk), or
single weights (1, 1). A `Live` says which cells are live for at least one of several languages. It copies that part of
a tensor out and writes it back; whatever lies outside is never written, so it stays as it is to the last bit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import bits
from fastmask.kept import Kept
from fastmask.linear import MaskedLinear
from fastmask.masks import FULL, INTEGERS, KINDS, Mask, checked_id


class Live:
    """Live cells of a weight [N, K]; those of a row mask say the same of its bias [N]. Immutable.

    Attributes:
        kind: of the mask: "rows", "columns", "blocks" or "weights"; "whole" for all of a parameter of any shape.
        shape: (N, K).
        cell: size of a cell, (bn, bk).
        words: which cells live, int32 [N / bn, ceil(K / bk / 32)], bits as in `fastmask.bits`.
    """

    def __init__(self, kind: str, shape: tuple[int, int], cell: tuple[int, int], words: Tensor) -> None:
        self.kind, self.shape, self.cell, self.words = kind, shape, cell, words
        self._kept: Tensor | None = None

    @property
    def _grid(self) -> tuple[Any, ...]:
        """How the weight is divided into cells."""
        return self.kind, self.shape, self.cell

    # ---- what lives

    def cells(self) -> Tensor:
        """Flags of the cells, bool [N / bn, K / bk]."""
        return bits.unpack(self.words, self.shape[1] // self.cell[1])

    @cached_property
    def share(self) -> float:
        """Live weights over all."""
        if self.kind == "whole":
            return 1.0
        cells = self.cells()
        return int(cells.sum()) / cells.numel()

    @cached_property
    def dead(self) -> Live:
        """The rest of the weight, as the same kind of view."""
        return Live(self.kind, self.shape, self.cell, bits.pack(~self.cells()))

    def keep(self, parameter: Tensor) -> Tensor:
        """Flags of the live weights, bool, which broadcast to the shape of the parameter."""
        cells, (bn, bk) = self.cells(), self.cell
        if self.kind == "rows":
            return cells if parameter.ndim == 2 else cells[:, 0]
        if self.kind == "blocks":
            cells = cells.repeat_interleave(bn, 0)
        return cells if bk == 1 else cells.repeat_interleave(bk, 1)

    def joined(self, other: Live) -> Live:
        """What lives in either; `WHOLE` if that is everything, or if they divide the weight into different cells."""
        if self._grid != other._grid:
            return WHOLE
        live = Live(self.kind, self.shape, self.cell, self.words | other.words)
        return WHOLE if live.share == 1 else live

    def within(self, outer: Live, parameter: Tensor) -> Live | None:
        """The same as a part of what `outer.read` returns, flattened to [1, live]; None if some of it lies elsewhere.

        Args:
            outer: another part of the same parameter.
            parameter: it, or anything of its shape.
        """
        if self._grid != outer._grid or bool((self.words & ~outer.words).any()):
            return None
        if torch.equal(self.words, outer.words):
            return WHOLE
        flags = outer.read(self.keep(parameter).expand(parameter.shape)).reshape(1, -1)
        return Live("weights", (1, flags.shape[1]), (1, 1), bits.pack(flags))

    @cached_property
    def runs(self) -> list[int]:
        """Of row masks: how many rows are dead, live, dead, live and so on; the first may be 0."""
        flags = torch.nn.functional.pad(self.cells()[:, 0], (1, 0))  # a dead row in front
        edges = [0, *(flags[1:] != flags[:-1]).nonzero().flatten().tolist(), len(flags) - 1]
        return [last - first for first, last in itertools.pairwise(edges)]

    # ---- as bytes, in files

    def encoded(self) -> Tensor:
        """Kind, cell and flags as uint8 [bytes] on the CPU; not of `WHOLE`."""
        head = torch.tensor([KINDS.index(self.kind), *self.cell], dtype=torch.int32, device="cpu")
        return torch.cat([head, self.words.cpu().flatten()]).view(torch.uint8)

    @classmethod
    def decoded(cls, code: Tensor, shape: Sequence[int], device: torch.device | None = None) -> Live:
        """What `encoded` was called on, as a part of a weight [N, K], or of a bias [N] of which K is then unknown.

        Raises:
            ValueError: not such bytes, or of a weight of another shape.
        """
        if code.dtype != torch.uint8 or code.ndim != 1 or len(code) < 12 or len(code) % 4:
            raise ValueError(f"expected a part of a weight as uint8 [bytes], given {code.dtype} {tuple(code.shape)}")
        words = code.clone().view(torch.int32)[3:]
        number, bn, bk = code[:12].clone().view(torch.int32).tolist()
        kind = KINDS[number] if 0 <= number < len(KINDS) else f"kind {number}"
        N, K = (*shape, bk)[:2]
        cells = {"rows": (1, K), "columns": (N, bk), "blocks": (bn, bk), "weights": (1, 1)}
        fits = len(shape) == 2 or (len(shape) == 1 and kind == "rows")
        if not fits or cells.get(kind) != (bn, bk) or bn < 1 or bk < 1 or N % bn or K % bk:
            raise ValueError(f"this is no part of a weight of shape {tuple(shape)}: {kind} of {bn} x {bk}")
        across = -(-(K // bk) // 32)
        if len(words) != N // bn * across:
            expected = f"expected {N // bn * across} words of flags for a weight of shape {tuple(shape)}"
            raise ValueError(f"{expected}, given {len(words)}")
        live = cls(kind, (N, K), (bn, bk), words.view(N // bn, across).to(device or code.device))
        if not torch.equal(bits.pack(live.cells()), live.words):
            raise ValueError(f"this part has flags beyond a weight of shape {tuple(shape)}")
        return live

    # ---- the live part of a tensor of the parameter's shape

    def read(self, parameter: Tensor) -> Tensor:
        """A copy of the live part, in the compact shape that `write` takes."""
        if self.kind == "rows":
            return parameter.index_select(0, self._units)
        if self.kind == "columns":
            return self._by_unit(parameter).index_select(1, self._units)
        if self.kind == "blocks":
            view, row, column = self._blocks(parameter)
            return view[row, :, column].contiguous()
        if self.kind == "weights":  # `masked_select` takes four times as long as finding and gathering
            return parameter.reshape(-1).index_select(0, self._units)
        return parameter.clone(memory_format=torch.preserve_format)

    def write(self, parameter: Tensor, live: Tensor) -> None:
        """Put what `read` returned back in place."""
        if self.kind == "rows":
            parameter.index_copy_(0, self._units, live)
        elif self.kind == "columns":
            self._by_unit(parameter).index_copy_(1, self._units, live)
        elif self.kind == "blocks":
            view, row, column = self._blocks(parameter)
            view[row, :, column] = live
        elif self.kind == "weights":
            parameter.put_(self._units, live)
        else:
            parameter.copy_(live)

    def only(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor that is +0 where it is dead, also where it holds NaN there."""
        if self.kind == "whole":
            return tensor
        kind = INTEGERS[tensor.element_size()]
        # Bits and all ones or zeros: 0 times NaN would not be 0, and `torch.where` takes three times as long.
        return tensor.view(kind).bitwise_and(self.keep(tensor).to(kind).neg_()).view(tensor.dtype)

    def _by_unit(self, weight: Tensor) -> Tensor:
        """A view [N, K / unit, unit]; of single columns [N, K], which is faster."""
        return weight if self.cell[1] == 1 else weight.unflatten(1, (-1, self.cell[1]))

    def _blocks(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A view [N / bn, bn, K / bk, bk], and the row and column of each live block in it."""
        (bn, bk), across = self.cell, self.shape[1] // self.cell[1]
        return weight.unflatten(1, (-1, bk)).unflatten(0, (-1, bn)), self._units // across, self._units % across

    @property
    def _units(self) -> Tensor:
        """Which cells live, int64 [live], row by row; kept if it is small: of single weights it may outweigh them."""
        if self._kept is not None:
            return self._kept
        index = self.cells().flatten().nonzero().squeeze(1)
        if 16 * len(index) <= self.shape[0] * self.shape[1]:
            self._kept = index
        return index


WHOLE = Live("whole", (0, 0), (0, 0), torch.zeros(0, 0, dtype=torch.int32, device="cpu"))
"""All of any parameter."""

_made: Kept[dict[frozenset[int], Live]] = Kept()
_MOST = 32  # sets of languages that are remembered for one mask: batches of many languages come in many sets


def live_of(mask: Mask, languages: Iterable[int]) -> Live:
    """What `languages` (ids; -1 is the full network) own together; `WHOLE` where that is everything.

    Masks never change, so it is made once for each mask and set of languages.

    Raises:
        ValueError: an id out of range.
    """
    made, languages = _made.of(mask.index, dict), frozenset(languages)
    if languages not in made:
        for language in languages:
            checked_id(language, mask.n_languages)
        if len(made) >= _MOST:
            made.clear()
        live = WHOLE if FULL in languages else _union(mask, sorted(languages))
        made[languages] = WHOLE if live.share == 1 else live
    return made[languages]


def live_in(layer: MaskedLinear, parameter: Tensor, languages: Iterable[int]) -> Live:
    """What `languages` own together of a layer's weight, as it is stored, or of its bias; raises as `live_of`."""
    return live_of(layer.stored_mask if parameter is layer.weight else layer.mask, languages)


def _union(mask: Mask, languages: list[int]) -> Live:
    N, K, unit = mask.out_features, mask.in_features, mask.geometry[0]
    if mask.kind in ("blocks", "weights"):
        index = mask.index.detach()  # what is kept with a tensor must not hold it
        words = reduce(torch.bitwise_or, [index[i] for i in languages] or [torch.zeros_like(index[0])])
        return Live(mask.kind, (N, K), (unit, mask.geometry[1]), words)
    keep = mask.flags()[languages].any(0)
    if mask.kind == "rows":
        return Live("rows", (N, K), (1, K), bits.pack(keep[:, None]))
    return Live("columns", (N, K), (N, unit), bits.pack(keep[None, ::unit]))


def masked_parameters(model: nn.Module) -> dict[Tensor, MaskedLinear]:
    """The layer of each parameter of the model that has a mask: of weights, and of biases below a row mask.

    A parameter that also stands somewhere else in the model (tied weights) may change anywhere: it has no entry, like
    all others that are not masked.
    """
    places: Counter[Tensor] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[Tensor, MaskedLinear] = {}
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            for parameter in (layer.weight, layer.bias if layer.mask.kind == "rows" else None):
                if parameter is not None and places[parameter] == 1:
                    found[parameter] = layer
    return found
