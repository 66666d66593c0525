"""Which weights of a parameter are live for at least one of several languages.

A masked weight [N, K] is described by flags of its rows, or by bits that several rows may share: columns need one line
of bits for all rows, blocks one for each row of blocks, single weights one for each row. Whatever has no entry here,
tied weights and parameters without a mask among it, is live as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmask import bits
from fastmask.linear import MaskedLinear
from fastmask.masks import Mask, live_blocks

__all__ = ["Live", "live_part", "masked_parameters"]

FULL = -1


@dataclass(frozen=True, eq=False)
class Live:
    """The live part of a parameter seen as [N, K]; a bias is [1, N].

    Attributes:
        shape: (N, K).
        rows: bool [N], or None.
        words: int32 [R, ceil(K / 32)] with R a divisor of N, bits as in `fastmask.bits`: row n of the weight has line
            n // (N / R). None where `rows` says it all.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    words: Tensor | None = None

    def keep(self) -> Tensor:
        """Flags of the live weights, bool, which broadcast to the parameter's shape."""
        if self.rows is not None:
            return self.rows[:, None]
        assert self.words is not None
        lines = bits.unpack(self.words, self.shape[1])
        return lines[0] if len(lines) == 1 else lines.repeat_interleave(self.shape[0] // len(lines), 0)


def masked_parameters(model: nn.Module, layers: Iterable[MaskedLinear]) -> dict[Tensor, tuple[MaskedLinear, bool]]:
    """The layer of each parameter that has a mask, and whether the parameter is its bias.

    A parameter that also stands somewhere else in the model (tied weights) may move anywhere and has no entry; a bias
    has one below a row mask only, which gates it.
    """
    places: Counter[Tensor] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[Tensor, tuple[MaskedLinear, bool]] = {}
    for layer in layers:
        if places[layer.weight] == 1:
            found[layer.weight] = (layer, False)
        if layer.mask.kind == "rows" and layer.bias is not None and places[layer.bias] == 1:
            found[layer.bias] = (layer, True)
    return found


_made: MutableMapping[Mask, dict[tuple[frozenset[int], bool], Live | None]] = WeakKeyDictionary()
_MOST = 32  # sets of languages that are remembered for one mask: batches of many languages come in many sets


def live_part(mask: Mask, languages: frozenset[int], of_bias: bool) -> Live | None:
    """What the union of `languages` (ids; -1 is the full network) owns of a weight or its bias; None: all of it.

    Masks never change, so it is made once for each mask and set of languages.

    Raises:
        ValueError: an id out of range.
    """
    made = _made.setdefault(mask, {})
    key = (languages, of_bias)
    if key not in made:
        for language in languages:
            if not FULL <= language < mask.n_languages:
                raise ValueError(
                    f"language id {language} is out of range: expected 0 to {mask.n_languages - 1}, "
                    "or -1 for the full network"
                )
        if len(made) >= _MOST:
            made.clear()
        made[key] = None if FULL in languages else _union(mask, sorted(languages), of_bias)
    return made[key]


def _union(mask: Mask, languages: list[int], of_bias: bool) -> Live | None:
    N, K = mask.out_features, mask.in_features
    if mask.kind in ("rows", "columns"):
        keep = torch.zeros(N if mask.kind == "rows" else K, dtype=torch.bool, device=mask.device)
        counts = mask.live_counts()
        for language in languages:
            keep[mask.index[language, : counts[language]]] = True
        if keep.all():
            return None
        if mask.kind == "rows":
            return Live((1, N), words=bits.pack(keep[None])) if of_bias else Live((N, K), rows=keep)
        return Live((N, K), words=bits.pack(keep[None]))
    if mask.kind == "blocks":
        blocks = live_blocks(mask.index, mask.extents, mask.geometry, (N, K))[languages].any(0)
        return None if blocks.all() else Live((N, K), words=bits.pack(blocks.repeat_interleave(mask.geometry[1], 1)))
    words = torch.zeros_like(mask.index[0])
    for language in languages:
        words |= mask.index[language]
    return None if bits.unpack(words, K).all() else Live((N, K), words=words)
