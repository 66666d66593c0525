"""Finding treebanks in a data folder and loading them as `datasets`.

A treebank is a folder ``UD_Language-Name`` with a CoNLL-U file per split: ``train.conllu`` or, as in the official
releases, ``en_ewt-ud-train.conllu`` (large ones come in several files: ``de_hdt-ud-train-a-1.conllu``).
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from fastmask.errors import unknown
from fastmask.files import StrPath, sha256_of
from fastmask.tasks.data.conllu import ConlluError, read_sentences
from fastmask.tasks.data.language_codes import LANGUAGE_CODES, same_language

SPLITS = ("train", "dev", "test")

FEATURES = datasets.Features(
    {
        "language": datasets.Value("string"),
        "treebank": datasets.Value("string"),
        "sent_id": datasets.Value("string"),
        "words": datasets.List(datasets.Value("string")),
        "upos": datasets.List(datasets.Value("string")),
        "heads": datasets.List(datasets.Value("int32")),
        "deprels": datasets.List(datasets.Value("string")),
    }
)

# Part of the cache key: raise it when the rows made from an unchanged file change.
_ROWS_VERSION = 4

_OFFICIAL = re.compile(r"(?P<bank>.+)-ud-(?P<split>train|dev|test)(?P<part>-.+)?\.conllu")
_CODE = re.compile(r"(?P<code>[a-z]{2,3})(_.*)?")


@dataclass(frozen=True)
class Treebank:
    """One treebank folder.

    Attributes:
        name: the folder's name, ``UD_English-EWT``.
        code: the language's code: the prefix of official file names, else looked up by the folder's language; a
            language that is in no table is called by its own name in lower case.
        folder: where it is.
        files: for every split that exists its files, in order; several that are not parts of one are refused when
            they are loaded.
    """

    name: str
    code: str
    folder: Path
    files: Mapping[str, tuple[Path, ...]]


def find_treebanks(data: StrPath) -> dict[str, Treebank]:
    """Return the treebanks under `data` by name, sorted.

    `data` holds the ``UD_*`` folders, or is the folder above (an unpacked release), or is one treebank itself.

    Raises:
        FileNotFoundError: there is no such folder, or no treebank in it.
    """
    root = Path(data).expanduser().resolve()
    if root.is_file():
        raise FileNotFoundError(f"{root} is a file (expected a folder of UD_* treebanks, such as {root.parent.parent})")
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist (expected a folder of UD_* treebanks)")
    # One that holds treebanks is none, such as an unpacked release that somebody calls UD_2.14.
    folders = [f for f in root.glob("UD_*") if f.is_dir() and not any(inner.is_dir() for inner in f.glob("UD_*"))]
    folders = folders or [f for f in root.glob("*/UD_*") if f.is_dir()] or [root] * root.name.startswith("UD_")
    if not folders:
        raise FileNotFoundError(f"no treebank in {root} (expected folders UD_Language-Name with *.conllu files)")
    return {folder.name: _treebank(folder) for folder in sorted(folders, key=lambda folder: folder.name)}


def _treebank(folder: Path) -> Treebank:
    """Read a folder's split files and its language code off their names."""
    language = folder.name.removeprefix("UD_").partition("-")[0]
    code = LANGUAGE_CODES.get(language, language.lower())
    files: dict[str, tuple[Path, ...]] = {}
    official = [(path, match) for path in sorted(folder.glob("*.conllu")) if (match := _OFFICIAL.fullmatch(path.name))]
    for split in SPLITS:
        plain = folder / f"{split}.conllu"
        paths = [path for path, match in official if match["split"] == split] + [plain] * plain.exists()
        if paths:
            files[split] = tuple(paths)
    if official and (named := _CODE.fullmatch(official[0][1]["bank"])):
        code = named["code"]
    return Treebank(folder.name, code, folder, files)


def trained_languages(data: StrPath) -> list[str]:
    """The codes of a folder's languages that have training data, sorted; see `find_treebanks`."""
    return sorted({bank.code for bank in find_treebanks(data).values() if "train" in bank.files})


def select_treebanks(treebanks: Mapping[str, Treebank], languages: str | Iterable[str]) -> dict[str, list[Treebank]]:
    """Return language code -> treebanks for a list such as ``"en,ar,UD_Czech-CAC"``.

    A code, or a language's name (``English``), stands for all treebanks of that language, a treebank's name for it
    alone; several names of one language are joined under its code. Codes keep the order in which they were asked for.

    Raises:
        FastmaskKeyError: neither a code nor a treebank of `treebanks`.
        ValueError: the list is empty.
    """
    asked = languages.split(",") if isinstance(languages, str) else list(languages)
    asked = [item.strip() for item in asked if item.strip()]
    if not asked:
        raise ValueError("no languages given (expected codes or treebank names, as in 'en,UD_Czech-CAC')")
    codes = {treebank.code for treebank in treebanks.values()}
    chosen: dict[str, list[Treebank]] = {}
    for item in asked:
        if item in treebanks:
            new = [treebanks[item]]
        elif (code := same_language(item, codes)) is not None:
            new = [treebank for treebank in treebanks.values() if treebank.code == code]
        else:
            raise unknown("language or treebank", item, [*codes, *treebanks])
        label = chosen.setdefault(new[0].code, [])
        label.extend(treebank for treebank in new if treebank not in label)
    return chosen


def load_treebanks(
    data: StrPath,
    languages: str | Iterable[str],
    splits: Sequence[str] = SPLITS,
    optional: Sequence[str] = (),
    cache_dir: StrPath | None = None,
) -> dict[str, dict[str, datasets.Dataset]]:
    """Load treebanks; return language code -> split -> data set with the columns of `FEATURES`.

    Every file is read and checked once and then comes from a cache in Arrow format, until its content changes.
    ``heads`` counts words from 1 and has 0 for the root.

    Args:
        data: see `find_treebanks`.
        languages: see `select_treebanks`. A split joins those of a language's chosen treebanks that have it.
        splits: which of train, dev and test to load.
        optional: splits of which a language may have none; they are then left out of its dictionary.
        cache_dir: where the cache lives; the default of `datasets` if None.

    Raises:
        FileNotFoundError: no such data folder, or no treebank in it.
        FastmaskKeyError: an unknown language, treebank or split.
        ValueError: a language has no treebank with a split that is not optional, or one has several files for a split
            that are not parts of one.
        ConlluError: a file is not valid CoNLL-U with one tree per sentence.
    """
    for split in [*splits, *optional]:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
    chosen = select_treebanks(find_treebanks(data), languages)
    for code, treebanks in chosen.items():  # all complaints before the first file is read
        for split in splits:
            if split not in optional and not any(split in treebank.files for treebank in treebanks):
                has = [f"  {bank.folder} (has {', '.join(bank.files) or 'no split'})" for bank in treebanks]
                said = f"language {code!r} has no {split} split. Looked for {split}.conllu or *-ud-{split}.conllu in:"
                raise ValueError("\n".join([said, *has]))
            for treebank in treebanks:
                _check_files(treebank, split)
    loaded: dict[str, dict[str, datasets.Dataset]] = {}
    for code, treebanks in chosen.items():
        loaded[code] = {}
        for split in splits:
            parts = [_load(treebank, split, cache_dir) for treebank in treebanks if split in treebank.files]
            if parts:
                loaded[code][split] = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return loaded


def _check_files(treebank: Treebank, split: str) -> None:
    """See that a split is one file, or the parts of one."""
    paths = treebank.files.get(split, ())
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file (expected a CoNLL-U file)")
    banks = {match and match["part"] and match["bank"] for match in (_OFFICIAL.fullmatch(path.name) for path in paths)}
    if len(paths) > 1 and (len(banks) > 1 or None in banks):
        names = ", ".join(path.name for path in paths)
        raise ValueError(
            f"{treebank.folder} has several files for {split}: {names} "
            "(expected one, or parts of one such as de_hdt-ud-train-a-1.conllu)"
        )


def _load(treebank: Treebank, split: str, cache_dir: StrPath | None) -> datasets.Dataset:
    """Return one split of one treebank from the cache, reading its files first if they are new or have changed."""
    # A tuple: `datasets` would take a list for shards to deal out.
    files = tuple((str(path), path.stat().st_size, sha256_of(path)) for path in treebank.files[split])
    with preparing():
        try:
            return datasets.Dataset.from_generator(
                _rows,
                features=FEATURES,
                cache_dir=None if cache_dir is None else str(cache_dir),
                gen_kwargs=dict(files=files, language=treebank.code, treebank=treebank.name, version=_ROWS_VERSION),
                split=datasets.NamedSplit(split),
            )
        except datasets.exceptions.DatasetGenerationError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ConlluError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None


def _rows(
    files: tuple[tuple[str, int, str], ...], language: str, treebank: str, version: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per sentence; sizes, checksums and version are here because arguments make up the cache key."""
    for path, _, _ in files:
        words = withheld = 0
        for sentence in read_sentences(path):
            words += len(sentence.words)
            withheld += sentence.words.count("_")
            row = {"language": language, "treebank": treebank, **vars(sentence)}
            yield {name: row[name] for name in FEATURES}
        if 2 * withheld > words:
            problem = f"{withheld} of {words} words are _, as where a corpus is sold apart from its trees"
            raise ConlluError(path, 1, f"{problem} (expected the words: merge them in, or name other treebanks)")


# Progress bars and log levels of `datasets` belong to the whole process, and a second thread must not find a data set
# half prepared; so one thread at a time. Between processes `datasets` itself holds a file lock.
_one_at_a_time = threading.RLock()


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def preparing() -> Iterator[None]:
    """Silence the progress bars and messages of `datasets` inside, and put both back as they were.

    Raises:
        OSError: its cache cannot be written; the message names it.
    """
    with _one_at_a_time:
        levels = datasets.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
        bars_were_on = datasets.are_progress_bars_disabled() is False
        datasets.logging.set_verbosity(logging.CRITICAL)  # errors are raised, too
        huggingface_hub.logging.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and getattr(cause, "errno", None) not in _NO_ROOM:
                cause = cause.__cause__
            if isinstance(cause, OSError):
                where = f"the cache of datasets, {datasets.config.HF_DATASETS_CACHE} (HF_DATASETS_CACHE names another)"
                raise OSError(cause.errno, cause.strerror, where) from error
            raise
        finally:
            datasets.logging.set_verbosity(levels[0])
            huggingface_hub.logging.set_verbosity(levels[1])
            if bars_were_on:
                datasets.enable_progress_bars()
