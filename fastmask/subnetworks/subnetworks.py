"""`Subnetworks`: which heads, neurons and weights of a model each language owns, in memory and on disk.

On disk they are one safetensors file, bits packed, with a checksum and a versioned header; never pickle.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.files import FileError, StrPath, parse_json, read_metadata, read_sealed, write_sealed

KINDS = ("heads", "neurons")
UNITS = (*KINDS, "both")
FORMAT, VERSION = "fastmask.subnetworks", "2"
CONTENT = "content"
_IN_FOLDERS = ("masks.safetensors", "subnetworks.safetensors")  # of a run, and of a model with masks
_RESERVED = ("format", "version", CONTENT, "sha256")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Subnetworks:
    """The subnetworks of L languages in one model; treat the tensors as read-only.

    Args:
        languages: L distinct names, in order; a language's id is its position.
        heads: bool [L, layers, heads] (key/value groups where attention is grouped-query), or None: all heads live.
        neurons: bool [L, layers, ffn], or None: all neurons live.
        weights: {module name: bool [L, out, in]}, or None.

    Raises:
        ValueError: nothing is masked, or a shape, dtype or name does not fit; the message names it.
    """

    def __init__(
        self,
        languages: Sequence[str],
        heads: Tensor | None = None,
        neurons: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.languages = _distinct_names(languages)
        self.heads, self.neurons = heads, neurons
        self.weights = dict(weights) if weights else None
        tensors = self._tensors()
        if not tensors:
            raise ValueError("nothing is masked: give heads, neurons or weights")
        for name, keep in tensors.items():
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.ndim != 3:
                given = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
                raise ValueError(f"expected {name} as a bool tensor with 3 dimensions, given {given}")
            if 0 in keep.shape:
                raise ValueError(f"{name} has the shape {tuple(keep.shape)} (expected at least one of everything)")
            if keep.is_meta:
                raise ValueError(f"expected {name} with values, given a tensor on the meta device, which has none")
            if keep.shape[0] != len(self.languages):
                raise ValueError(f"{name} has masks for {keep.shape[0]} languages, expected {len(self.languages)}")

    @property
    def units(self) -> dict[str, Tensor]:
        """The masks over "heads" and "neurons", bool [L, layers, units], of the kinds that are masked."""
        named = {"heads": self.heads, "neurons": self.neurons}
        return {kind: keep for kind, keep in named.items() if keep is not None}

    def _tensors(self) -> dict[str, Tensor]:
        """All masks, by the names that a file has for them."""
        return self.units | {f"weights.{name}": keep for name, keep in (self.weights or {}).items()}

    # ---- making some

    @classmethod
    def of(cls, languages: Sequence[str], masks: Mapping[str, Tensor]) -> Subnetworks:
        """The subnetworks of masks by name: "heads", "neurons" and "weights.MODULE"; raises as the class does."""
        weights = {name.removeprefix("weights."): keep for name, keep in masks.items() if name.startswith("weights.")}
        return cls(languages, masks.get("heads"), masks.get("neurons"), weights)

    @classmethod
    def full(cls, model: Any, languages: Sequence[str], units: str = "heads") -> Subnetworks:
        """Every language owns everything. `model`: a model or its config; `units`: heads, neurons or both."""
        return cls.random(model, languages, density=1.0, seed=0, units=units)

    @classmethod
    def random(
        cls, model: Any, languages: Sequence[str], density: float, seed: int, units: str = "heads"
    ) -> Subnetworks:
        """Every language owns a random `density` of each layer's units, at least one a layer; same seed, same masks.

        Args:
            model: the model, or its Hugging Face config: says how many units there are (`models.structure.Structure`).
            languages: their names.
            density: above 0 and at most 1.
            seed: of the drawing.
            units: "heads", "neurons" or "both".
        """
        names = _distinct_names(languages)
        if not 0 < density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, given {density}")
        if units not in UNITS:
            raise unknown("kind of unit", units, UNITS)
        from fastmask.models.structure import structure_of  # which imports this module

        structure, generator = structure_of(model), torch.Generator().manual_seed(seed)

        def draw(kind: str) -> Tensor:
            there = structure.sizes(kind)
            sizes = torch.tensor([max(1, round(density * size)) for size in there], device="cpu").repeat(len(names), 1)
            return random_of_sizes(sizes, there, generator)

        return cls.of(names, {kind: draw(kind) for kind in KINDS if units in (kind, "both")})

    # ---- looking inside

    def index(self, language: str) -> int:
        """The id of a language. Raises KeyError with the nearest names."""
        if language not in self.languages:
            raise unknown("language", language, self.languages)
        return self.languages.index(language)

    def ids(self, languages: Iterable[str]) -> Tensor:
        """The ids of many languages in their order, int64 on the CPU, whatever the default device.

        Raises:
            KeyError: an unknown language; the message names the nearest ones.
            ValueError: a single name, or a set, which has no order.
        """
        return torch.tensor([self.index(name) for name in _in_order(languages)], dtype=torch.int64, device="cpu")

    @property
    def density(self) -> dict[str, Tensor]:
        """Share of live units of each language, float32 [L], for each of heads, neurons and masked modules."""
        return {name: keep.flatten(1).float().mean(1) for name, keep in self._tensors().items()}

    def overlap(self, what: str | None = None) -> Tensor:
        """Jaccard similarity of the languages' masks, float32 [L, L]: |A and B| / |A or B|, 1 for two empty masks.

        Args:
            what: "heads", "neurons" or "weights"; the first of these that is masked if not given.
        """
        if what is None:
            what = next(iter(self._tensors())).split(".")[0]
        chosen = [keep for name, keep in self._tensors().items() if name.startswith(what)]
        if not chosen:
            raise unknown("masked part", what, {name.split(".")[0] for name in self._tensors()})
        flat = torch.cat([keep.flatten(1) for keep in chosen], 1).float()
        both = flat @ flat.t()
        sizes = flat.sum(1)
        either = sizes[:, None] + sizes[None, :] - both
        return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))

    # ---- deriving others

    def map(self, function: Callable[[Tensor], Tensor], languages: Sequence[str] | None = None) -> Subnetworks:
        """New subnetworks of `function` of every mask tensor, bool [L, ...].

        Args:
            function: returns bool [L', ...].
            languages: the L' names of what it returns; those of these subnetworks if not given.
        """
        names = self.languages if languages is None else languages
        return Subnetworks.of(names, {name: function(keep) for name, keep in self._tensors().items()})

    def select(self, languages: Iterable[str]) -> Subnetworks:
        """The subnetworks of these languages, in this order. Nothing is copied where they are neighbours here.

        Raises:
            KeyError: an unknown language; the message names the nearest ones.
            ValueError: no language, one more than once, a single name, or a set, which has no order.
        """
        names = _distinct_names(languages)
        rows = self.ids(names)
        first, last = int(rows[0]), int(rows[-1])
        if rows.tolist() == list(range(first, last + 1)):
            return self.map(lambda keep: keep[first : last + 1], names)
        return self.map(lambda keep: keep[rows], names)

    def append(self, name: str, subnet: Subnetworks) -> Subnetworks:
        """These languages and a last one called `name`, with the masks that `subnet` has for its only language.

        Raises:
            ValueError: there is a language of that name, `subnet` has several, or it does not fit (see `stack`).
        """
        if name in self.languages:
            raise ValueError(f"language {name!r} has a subnetwork already (languages: {', '.join(self.languages)})")
        if not isinstance(subnet, Subnetworks) or len(subnet.languages) != 1:
            raise ValueError(f"expected the Subnetworks of one language to append as {name!r}, given {subnet!r}")
        return Subnetworks.stack([self, subnet.map(lambda keep: keep, [name])])

    def rename(self, names: Mapping[str, str]) -> Subnetworks:
        """The same subnetworks under other names: {old: new}; languages that are not mentioned keep theirs.

        Raises:
            KeyError: an unknown language; the message names the nearest ones.
            ValueError: two languages would have one name.
        """
        for old in names:
            self.index(old)
        return self.map(lambda keep: keep, [names.get(language, language) for language in self.languages])

    @classmethod
    def stack(cls, parts: Iterable[Subnetworks]) -> Subnetworks:
        """All languages of several subnetworks of one model, one after the other.

        Raises:
            ValueError: no part, a language in two of them, or parts that mask other units, modules or sizes, or lie on
                other devices; the message names both.
        """
        parts = list(parts)
        wrong = [type(part).__name__ for part in parts if not isinstance(part, Subnetworks)]
        if wrong or not parts:
            raise ValueError(f"expected Subnetworks to stack, given {', '.join(wrong) or 'none'}")
        tensors = [part._tensors() for part in parts]
        for part, own in zip(parts, tensors, strict=True):
            for name in tensors[0] | own:
                sizes = [
                    f"{tuple(of[name].shape[1:])} on {of[name].device}" if name in of else "not masked"
                    for of in (tensors[0], own)
                ]
                if sizes[0] != sizes[1]:
                    raise ValueError(f"cannot stack {parts[0]!r} and {part!r}: {name} is {sizes[0]} and {sizes[1]}")
        joined = {name: torch.cat([own[name] for own in tensors]) for name in tensors[0]}
        return cls.of([language for part in parts for language in part.languages], joined)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Subnetworks) or self.languages != other.languages:
            return False
        mine, theirs = self._tensors(), other._tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = [f"{name} {tuple(of.shape[1:])} {of.float().mean():.0%} live" for name, of in self._tensors().items()]
        more = f", ... {len(parts) - 3} more" if len(parts) > 3 else ""
        return f"Subnetworks({', '.join(self.languages)}: {', '.join(parts[:3])}{more})"

    # ---- files

    def save(self, path: StrPath, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, 8 units to a byte, with a checksum; see `fastmask.files.replace_file`.

        Args:
            path: where to.
            metadata: names and texts that are kept with it.

        Raises:
            ValueError: metadata of another type, or under a name that the file uses itself.
            OSError: it cannot be written; what was there before is still there.
        """
        from fastmask.records import MasksRecord

        metadata = metadata or {}
        for name, text in metadata.items():
            if name in _RESERVED or not isinstance(name, str) or not isinstance(text, str):
                expected = f"names and texts, and no name of {', '.join(_RESERVED)}"
                raise ValueError(f"metadata has {name!r}: {text!r} (expected {expected})")
        named = self._tensors()
        flags = {name: keep.flatten(1).cpu().numpy() for name, keep in named.items()}
        packed = {name: torch.from_numpy(np.packbits(of, axis=1, bitorder="little")) for name, of in flags.items()}
        shapes: dict[str, Any] = {name: tuple(keep.shape) for name, keep in named.items()}
        content = MasksRecord(languages=self.languages, shapes=shapes).model_dump_json()
        write_sealed(path, packed, {"format": FORMAT, "version": VERSION, CONTENT: content, **metadata})

    @classmethod
    def load(cls, path: StrPath) -> Subnetworks:
        """Read what `save` wrote; of the folder of a run or a model, the file in it.

        Raises:
            FileNotFoundError: no such file.
            FileError: a ValueError; the file is damaged (one bit is enough), of another kind or of another version.
        """
        from fastmask.records import MasksRecord

        path = masks_file(path)
        header = read_metadata(path)  # before the tensors of what may be another kind of file
        if header.get("format") != FORMAT:
            raise FileError(path, "is a safetensors file, but not one of fastmask subnetworks")
        if (version := header.get("version")) != VERSION:
            raise FileError(path, f"has format version {version} (expected {VERSION}; a fastmask of its time reads it)")
        packed, header = read_sealed(path)
        content: MasksRecord = parse_json(path, header.get(CONTENT, ""), MasksRecord)
        try:
            masks = {name: _unpacked(packed[name], shape) for name, shape in content.shapes.items()}
            return cls.of(content.languages, masks)
        except (ValueError, KeyError) as error:
            raise FileError(path, f"is damaged: {error}") from None


def masks_in(folder: StrPath) -> Path | None:
    """The masks file of a run, or of a model with masks, by its folder; None if there is none."""
    return next((inside for name in _IN_FOLDERS if (inside := Path(folder, name)).is_file()), None)


def masks_file(path: StrPath) -> StrPath:
    """The file itself, or the one in a folder; FileNotFoundError for a folder without one."""
    found = masks_in(path) or path
    if Path(found).is_dir():
        raise FileNotFoundError(f"{path} has no {_IN_FOLDERS[0]} (expected a file of subnetworks, or a run with one)")
    return found


def _unpacked(packed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    L, layers, units = shape
    if packed.dtype != torch.uint8 or packed.shape != (L, -(-layers * units // 8)):
        raise ValueError(f"bits are {packed.dtype} {tuple(packed.shape)} (expected uint8 for a mask of shape {shape})")
    flags = np.unpackbits(packed.numpy(), axis=1, count=layers * units, bitorder="little")
    return torch.from_numpy(flags.view(bool).reshape(shape))


def _in_order(languages: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple; not the letters of one name, and not a set, whose order changes from run to run."""
    if isinstance(languages, str | bytes):
        raise ValueError(
            f"expected a sequence of language names, given the single name {languages!r}: [{languages!r}]?"
        )
    if isinstance(languages, set | frozenset) or not isinstance(languages, Iterable):
        raise ValueError(f"expected language names in a fixed order (list, tuple), given a {type(languages).__name__}")
    return tuple(languages)


def _distinct_names(languages: Iterable[str]) -> tuple[str, ...]:
    names = _in_order(languages)
    if not names:
        raise ValueError(f"expected at least one language name, given {languages!r}")
    wrong = [name for name in names if not isinstance(name, str) or not name or _CONTROL.search(name)]
    if wrong:
        raise ValueError(
            f"expected language names that are text, not empty and without control characters, given {wrong[:5]!r}"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"expected distinct language names, given {repeated[:5]!r} more than once")
    return names


def random_of_sizes(sizes: Tensor, units: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random masks bool [L, layers, most units]: `sizes` [L, layers] live ones among the `units` that a layer has."""
    scores = torch.rand(*sizes.shape, max(units), generator=generator, device=generator.device)
    missing = torch.arange(max(units), device="cpu") >= torch.tensor(units, device="cpu")[:, None]
    scores.masked_fill_(missing.to(scores.device), 1)  # above all that are drawn
    return scores.argsort(-1).argsort(-1).to(sizes.device) < sizes[..., None]
