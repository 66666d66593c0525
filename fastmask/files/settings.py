"""The YAML that people write by hand: names and values, without what YAML has beyond them and what could hang.

No tags, aliases or merge keys, of which seven lines can stand for billions of items; names are text and stand once;
numbers are decimal. A date is text, as a folder may be called so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from fastmask.files.reading import FileError, check, read_text
from fastmask.files.writing import write_text

__all__ = ["read_yaml", "write_yaml"]

T = TypeVar("T")

BYTES = 1 << 16  # the longest file of settings that this package writes has 4 KB
DEPTH = 20
_STANDARD = "tag:yaml.org,2002:"
_NUMBER = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9]{0,30})"),
    "float": re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|\.inf)|\.nan", re.IGNORECASE),
}


class _Error(yaml.MarkedYAMLError):
    def __init__(self, problem: str, node: Any) -> None:
        super().__init__(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """A safe loader of the part of YAML that is described above."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_STANDARD}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Error("aliases are not allowed", event)
        if event.tag is not None:
            raise _Error(f"tags are not allowed, and there is {event.tag}", event)
        self._depth += 1
        if self._depth > DEPTH:
            raise _Error(f"nested more than {DEPTH} deep", event)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_number(self, node: Any) -> int | float:
        """A decimal number: 1:1:1:... would be one to the base of 60, however long, and 010 the number 8."""
        kind = node.tag.removeprefix(_STANDARD)
        if not _NUMBER[kind].fullmatch(node.value):
            raise _Error(f"{node.value[:40]!r} is no decimal number (expected one, or text in quotation marks)", node)
        found: int | float = self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose names are text, each given once."""
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag != f"{_STANDARD}str":
                raise _Error("a name that is not text (expected 'name: value', in quotation marks if need be)", key)
            if key.value in names:
                raise _Error(f"{key.value!r} stands twice", key)
            names.add(key.value)
        return super().construct_mapping(node, deep)


for _kind in _NUMBER:
    _Loader.add_constructor(f"{_STANDARD}{_kind}", _Loader.construct_number)


def read_yaml(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a YAML file of settings whose content is of the type `kind` (an empty file is an empty mapping).

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not UTF-8, not YAML as described above, nested too deeply, too long, or of another type.
    """
    text = read_text(path, BYTES)
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{os.fspath(path)}:{mark.line + 1}"
        raise FileError(where, f"is not YAML that fastmask reads: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise FileError(path, f"is not YAML that fastmask reads: {' '.join(str(error).split())}") from None
    return check(path, {} if content is None else content, kind)


def write_yaml(path: str | os.PathLike[str], content: Mapping[str, Any], *, follow: bool = True) -> None:
    """Write names and values, in their order, as `read_yaml` reads them; see `replace_file`."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # PyYAML writes these as they are, and reads them as spaces
        text = yaml.safe_dump(dict(content), sort_keys=False)
    write_text(path, text, follow=follow)
