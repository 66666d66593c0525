"""The files of a report in their folder: each there whole, those of the report before gone, nothing else touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fastmask.files import is_leftover, replace_file

__all__ = ["CONTENTS", "REPORT", "check_folder", "write_files"]

REPORT = "report.html"
CONTENTS = "contents.json"  # the names of the files that belong to the report


def check_folder(folder: Path) -> None:
    """See that a report can go into a folder: there is none yet, or it is empty, or it holds a report.

    Raises:
        ValueError: it holds something else.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if folder.is_file() or (not all(map(is_leftover, names)) and CONTENTS not in names):
        raise ValueError(f"{folder} is there already and holds no report (expected a new or an empty folder)")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, the page last, then remove those of the report before.

    Args:
        folder: see `check_folder`.
        files: name -> content.
    """
    before = _contents(folder)
    # Until all is in place both belong to the report: interrupted, it leaves nothing that would stay for ever.
    _write(folder / CONTENTS, json.dumps(sorted({*before, *files}), indent=1).encode())
    for name in sorted(files, key=lambda name: name == REPORT):
        _write(folder / name, files[name])
    for name in set(before) - set(files):
        (folder / name).unlink(missing_ok=True)
    _write(folder / CONTENTS, json.dumps(sorted(files), indent=1).encode())


def _contents(folder: Path) -> list[str]:
    """The files of the report that is there; names that lead out of the folder are not ours."""
    if not (folder / CONTENTS).is_file():
        return []
    names = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    return [name for name in names if Path(name).name == name]


def _write(path: Path, content: bytes) -> None:
    replace_file(path, lambda partial: partial.write_bytes(content))
