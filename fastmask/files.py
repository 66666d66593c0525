"""Files of users and of runs: read with messages that name them, written whole or not at all.

Nothing that is read runs code. What is being written has a name that starts with ``.partial-`` until it is complete and
on disk; what is being deleted one that starts with ``.old-``. Both are never read.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STDOUT = "/dev/stdout"
LOCK_FILES = LOCK, HOLDER = ".lock", ".holder"
MANIFEST = "manifest.json"  # has the SHA-256 of every file of a folder, and is written last
SEAL = "sha256"  # in the header of a sealed file: of everything else in it and of all tensors
_LEFTOVER = re.compile(r"\.(partial|old)-[0-9a-f]{12}-(.+)", re.DOTALL)

T = TypeVar("T")
StrPath = str | os.PathLike[str]


# ---- reading text, JSON and YAML


class FileError(ValueError):
    """A file that is damaged or not what was asked for; the message reads ``FILE: what is wrong (expected)``."""

    def __init__(self, path: StrPath, problem: str) -> None:
        """Build the message, one line that a terminal can show, whatever it repeats of a file."""
        said = " ".join(problem.split())
        said = said if len(said) <= 800 else f"{said[:500]} ... {said[-250:]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{os.fspath(path)}: {said}"))


def check(path: StrPath, content: Any, kind: type[T] | Any) -> T:
    """Return `content`, read at `path`, if it is of the type `kind`, such as ``dict[str, int]`` or a `records.Record`.

    Nothing is converted. Raises FileError, which says where something is of another type, missing or unknown.
    """
    return _checked(path, kind, lambda adapter: adapter.validate_python(content, strict=True))


def parse_json(path: StrPath, text: str, kind: type[T] | Any = dict) -> T:
    """Return what a JSON text, read at `path`, holds; see `check`. A list passes for a tuple, which JSON lacks."""
    return _checked(path, kind, lambda adapter: adapter.validate_json(text, strict=True))


def _checked(path: StrPath, kind: Any, validate: Callable[[Any], T]) -> T:
    from pydantic import TypeAdapter, ValidationError  # not for what reads no files

    try:
        return validate(TypeAdapter(kind))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise FileError(path, f"is not JSON: {first['ctx']['error']}") from None
        where = ".".join(str(step) for step in first["loc"])
        given = "" if first["type"] == "missing" else f", given {first['input']!r:.60}"
        raise FileError(path, f"{where + ': ' if where else ''}{first['msg']}{given}") from None


def read_json(path: StrPath, kind: type[T] | Any = dict) -> T:
    """Read a JSON file whose content is of the type `kind`; raises OSError or FileError."""
    return parse_json(path, _read_text(path), kind)


class _Loader(yaml.SafeLoader):
    """A safe loader to which a date is text: folders, and plans, are called so."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: StrPath, kind: type[T] | Any = dict) -> T:
    """Read a YAML file whose content is of the type `kind`, as `read_json` does; an empty file is an empty mapping."""
    text = _read_text(path)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileError(path, f"is not YAML: {error}") from None
    return check(path, {} if content is None else content, kind)


def _read_text(path: StrPath) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, f"byte {error.start + 1} is not UTF-8 (expected a UTF-8 file)") from None


def sha256_of(path: StrPath) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- tensors: safetensors


def read_metadata(path: StrPath) -> dict[str, str]:
    """Read the header of a safetensors file; raises what `read_tensors` does."""
    return _opened(path).metadata() or {}


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file: its tensors by name, on the CPU, and its header; FileError for another file."""
    file = _opened(path)
    try:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise FileError(path, f"is damaged ({error})") from None


def _opened(path: StrPath) -> Any:
    try:
        return safe_open(os.fspath(path), framework="pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise FileError(path, f"is not a safetensors file, or is truncated ({error})") from None


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a new safetensors file of tensors that may be views, share memory or lie on a GPU."""
    contiguous = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=contiguous) for name, tensor in tensors.items()}
    save_file(plain, path, metadata=header)


def write_sealed(path: StrPath, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header that `read_sealed` reads, and refuses where one bit is another; see `replace_file`."""
    sealed = {**header, SEAL: digest_of(tensors, header)}
    replace_file(path, lambda partial: write_tensors(partial, tensors, sealed))


def read_sealed(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_sealed` wrote: tensors and header; raises what `read_tensors` does, also for other content."""
    tensors, header = read_tensors(path)
    seal = header.pop(SEAL, None)
    if seal != digest_of(tensors, header):
        raise FileError(path, "is damaged: its content is not what its checksum says")
    return tensors, header


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The SHA-256 of the header, and of the names, dtypes, shapes and bytes of all tensors, in any order."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(header.items()), described]).encode())
    for name in names:
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- writing


def replace_file(path: StrPath, write: Callable[[Path], Any]) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, in place of the file that is there.

    Folders that are not there are made; a file that is there keeps its permissions, and links are followed. What cannot
    be replaced (`STDOUT`, a pipe, a device) is written into once all of it is there.
    An OSError (the disk is full, ...) names the file, and what was there is still there.
    """
    if _is_stream(path):
        _write_into(path, write)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(target)
    try:
        with write_errors(path, partial):
            partial.touch()
            mode = (target if target.exists() else partial).stat().st_mode
            write(partial)
            partial.chmod(mode)  # some writers make a file of their own, for its owner's eyes only
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _is_stream(path: StrPath) -> bool:
    """Whether there is something that is no regular file, or a standard output that a shell may have redirected."""
    return os.fspath(path) == STDOUT or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


def _write_into(path: StrPath, write: Callable[[Path], Any]) -> None:
    """Write into what cannot be replaced: all of it or, if `write` fails, nothing."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        write(whole)
        sys.stdout.flush()
        # Opened anew, a file that standard output goes to would be written from its beginning.
        stdout = os.fspath(path) == STDOUT
        with open(1 if stdout else path, "wb", closefd=not stdout) as target, open(whole, "rb") as source:
            shutil.copyfileobj(source, target)


def write_text(path: StrPath, text: str) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()))


def write_yaml(path: StrPath, content: Mapping[str, Any]) -> None:
    """Write names and values, in their order, as `read_yaml` reads them; see `replace_file`."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # PyYAML writes these as they are, and reads them as spaces
        text = yaml.safe_dump(dict(content), sort_keys=False)
    write_text(path, text)


def check_writable(path: StrPath) -> None:
    """See, before any work is done, that `replace_file` can put a file at `path`; an OSError names it if not."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)", os.fspath(path))
    if not _is_stream(path):
        with write_errors(path, folder := next(parent for parent in target.parents if parent.exists())):
            # Tried out: permissions do not tell of a file system that is read-only or makes no files, such as /proc.
            tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def write_errors(path: StrPath, partial: Path) -> Iterator[None]:
    """Say which file could not be written: the system names `partial`, what is written first, or none at all.

    An error that names another file is left alone: it is about what is read meanwhile.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(partial)):
            raise
        what = (error.strerror or str(error)).removeprefix("cannot write: ")  # it may have been named by the writer
        raise OSError(error.errno or errno.EIO, f"cannot write: {what}", os.fspath(path)) from error
    except Exception as error:
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))  # safetensors wraps the system's error in its own
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, f"cannot write: {os.strerror(number)}", os.fspath(path)) from error


def _sync(path: Path) -> None:
    """Have a file or a folder on disk before its new name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(handle)


# ---- folders


def write_folder(target: Path, writers: Mapping[str, Callable[[Path], Any]], replace: bool = False) -> None:
    """Let each writer write a file or a folder, in their order, and put the folder of all of them at `target` at once.

    There, no folder may be yet, or an empty one, unless `replace` removes it once everything is written. Writers get
    the path of their name; the name "." is the folder itself. Of what an OSError ends, nothing is left.
    """
    partial = partial_name(target)
    try:
        partial.mkdir(parents=True)
        for name, write in writers.items():
            with write_errors(target / name, partial):
                write(partial / name)
        with write_errors(target, partial):
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            if replace:
                remove_tree(target)
            os.replace(partial, target)
            _sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_manifest(path: Path, names: Iterable[str]) -> None:
    """Write the manifest of the files `names` beside it."""
    files = {name: sha256_of(path.parent / name) for name in sorted(names)}
    path.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def check_files(folder: Path) -> None:
    """See that the files of a folder are those of its manifest to the byte; FileError names the first that is not."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileError(path, "is missing (expected the list of the folder's files)")
    files: dict[str, str] = check(path, read_json(path).get("files"), dict[str, str])
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise FileError(file, f"is missing (expected, as {MANIFEST} has it)")
        if sha256_of(file) != digest:
            raise FileError(file, f"has other content than when it was written (expected that of {MANIFEST})")


def files_in(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all files in it and in its folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def partial_name(target: Path, kind: str = "partial") -> Path:
    """A new name beside `target` for what is half written ("partial") or half deleted ("old")."""
    # At random: process numbers repeat between containers that share a folder.
    return target.with_name(f".{kind}-{secrets.token_hex(6)}-{target.name}")


def is_leftover(name: str, of: str | None = None) -> bool:
    """Whether a name is one of `partial_name`, of any file or folder or of the one called `of`."""
    found = _LEFTOVER.fullmatch(name)
    return found is not None and of in (None, found[2])


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Delete what killed processes left half written or half deleted in a folder that this process holds; see `held`.

    Only names that `partial_name` makes, directly in the folder: of any file or folder, or of the one called `of`.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path.name, of):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Delete a folder, if it is there; one that is half deleted never stands under its own name."""
    if folder.exists():
        doomed = partial_name(folder, "old")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


class HeldError(RuntimeError):
    """Another process is writing to the folder; the message names it."""


@contextmanager
def held(folder: StrPath, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made if need be; the operating system lets go of it however the process ends.

    Where another process holds it, HeldError is raised, after `wait` seconds: it may be ending.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        who = holder.read_text() if holder.is_file() else "another process"
        raise HeldError(f"{folder} is in use by {who} (expected one process at a time)") from None
    try:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        yield
    finally:
        # Removed while the lock is still held: a name that is there is that of the process that holds it.
        holder.unlink(missing_ok=True)
        lock.release()
