"""Files with something wrong in them: the same ones for the same seed, from one bit to a value of another type.

`mutants(content, kind, count, seed)` is all that the tests need. A kind adds to what is done to any bytes what can be
done to lines and numbers of a text, to the values of a tree (JSON, YAML), or to the header of a safetensors file.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import yaml

__all__ = ["KINDS", "in_order", "mutants"]

Strategy = Callable[[bytes, random.Random], "bytes | None"]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 1.5, -0.0, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), "", " ", "0",
    "1", "-1", "1.0", "٣", "true", "no", "null", "x", "a,b", "../x", "/etc/passwd", "[/b]", "$\\frac$", "a\nb", "\x00",
    "\x1b[2J", "\u2028", "\ud800", "a" * 3000, [], {}, [[]], [None], {"a": 1}, {"": {}}, [1, "x", {}],
]  # fmt: skip
NUMBERS = [
    "0", "1", "-1", "00", "007", "1e3", "1e999", "0x10", "1_0", "٣", "²", "+1", "1.0", ".5", "1:30", "NaN", "Infinity",
    "99999999999", "9" * 25, "9" * 5000, "", " 1", "true", "null",
]  # fmt: skip
LETTERS = [
    "\x00", "\x1f", "\x85", "\u2028", "\u00a0", "\ufeff", "\u202e", "\r", "\n", "\t", " ", "#", "&a ", "*a ", "<<: ",
    "!!python/name:os.system ", "- ", "{", "}", "[", "]", ":", '"', "'", "\\", "_", "é", "日", "😀",
]  # fmt: skip


# ---- any bytes


def _span(content: bytes, draw: random.Random, most: int = 64) -> tuple[int, int]:
    start = draw.randrange(len(content))
    return start, min(len(content), start + draw.randrange(1, most))


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_many(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randrange(2, 12)):
        content = flip_bit(content, draw)
    return content


def set_bytes(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    filling = draw.choice([b"\0" * (end - start), b"\xff" * (end - start), draw.randbytes(end - start)])
    return content[:start] + filling + content[end:]


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, len(content) - 1, draw.randrange(len(content))])]


def cut(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:start] + content[end:]


def double(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:end] + content[start:end] + content[end:]


def move(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    rest = content[:start] + content[end:]
    to = draw.randrange(len(rest) + 1)
    return rest[:to] + content[start:end] + rest[to:]


def insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.randbytes(draw.randrange(1, 16)) + content[at:]


def lengthen(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice([b"\0", b"\n", draw.randbytes(8), content])


BYTES: list[Strategy] = [flip_bit, flip_many, set_bytes, truncate, cut, double, move, insert, lengthen]


# ---- lines and numbers


def _lines(change: Callable[[list[str], random.Random], None]) -> Strategy:
    def strategy(content: bytes, draw: random.Random) -> bytes:
        lines = content.decode("utf-8", "surrogateescape").split("\n")
        change(lines, draw)
        return "\n".join(lines).encode("utf-8", "surrogateescape")

    strategy.__name__ = change.__name__
    return strategy


def swap_lines(lines: list[str], draw: random.Random) -> None:
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def drop_line(lines: list[str], draw: random.Random) -> None:
    del lines[draw.randrange(len(lines))]


def copy_line(lines: list[str], draw: random.Random) -> None:
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))


def join_lines(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    lines[at : at + 2] = ["".join(lines[at : at + 2])]


def add_letters(lines: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(lines))
    place = draw.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:place] + draw.choice(LETTERS) + lines[at][place:]


def change_number(lines: list[str], draw: random.Random) -> None:
    places = [(at, found) for at, line in enumerate(lines) for found in re.finditer(r"\d+", line)]
    if places:
        at, found = draw.choice(places)
        lines[at] = lines[at][: found.start()] + draw.choice(NUMBERS) + lines[at][found.end() :]


def change_column(lines: list[str], draw: random.Random) -> None:
    """Swap two columns of a line of a table, or give one the value of another line's."""
    tables = [at for at, line in enumerate(lines) if "\t" in line]
    if tables:
        at, other = draw.choice(tables), draw.choice(tables)
        columns, others = lines[at].split("\t"), lines[other].split("\t")
        place = draw.randrange(len(columns))
        value = draw.choice([draw.choice(columns), draw.choice(others), "", "_", draw.choice(NUMBERS)])
        columns[place : place + 1] = draw.choice([[value], [], [columns[place]] * 2])
        lines[at] = "\t".join(columns)


def end_lines_otherwise(lines: list[str], draw: random.Random) -> None:
    some = draw.random() < 0.5
    lines[:] = [line + ("\r" if not some or draw.random() < 0.3 else "") for line in lines]


TEXT: list[Strategy] = [
    _lines(change)
    for change in (
        swap_lines, drop_line, copy_line, join_lines, add_letters, change_number, change_column, end_lines_otherwise,
    )
]  # fmt: skip


# ---- trees of values


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, value in items for place in [(tree, key), *_places(value)]]


def change_tree(tree: Any, draw: random.Random) -> Any:
    """Another value, type, name or order somewhere in a tree of lists, dicts and scalars, which is changed."""
    root = {"": tree}
    places = _places(root)
    where, key = draw.choice(places[1:] or places)
    do = draw.choice(("value", "value", "value", "remove", "rename", "add", "wrap", "swap"))
    if do == "value":
        where[key] = draw.choice(VALUES)
    elif do == "wrap":
        where[key] = draw.choice([[where[key]], {"a": where[key]}, str(where[key])])
    elif do == "swap":
        other, name = draw.choice(places[1:] or places)
        where[key], other[name] = other[name], where[key]
    elif isinstance(where, list):
        where.insert(key, where[key]) if do == "add" else where.pop(key)
    elif where is not root:
        value = where[key] if do == "add" else where.pop(key)
        if do != "remove":
            name = draw.choice(["x", "", key + "x", key[:-1], key.upper(), "../x", "__class__"])
            where[name] = value
    return root[""]


def change_json(content: bytes, draw: random.Random) -> bytes | None:
    try:
        return json.dumps(change_tree(json.loads(content), draw)).encode("utf-8", "surrogatepass")
    except ValueError:  # a cycle, made by swapping a value with one inside it
        return None


def nest_json(content: bytes, draw: random.Random) -> bytes:
    depth = draw.choice([10, 1000, 100_000])
    opened, closed = draw.choice([("[", "]"), ('{"a":', "}")])
    return draw.choice([opened * depth, opened * depth + content.decode() + closed * depth]).encode()


def change_yaml(content: bytes, draw: random.Random) -> bytes | None:
    try:
        changed = change_tree(yaml.safe_load(content), draw)
        return yaml.safe_dump(changed, sort_keys=False, default_flow_style=draw.choice([None, False, True])).encode()
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def nest_yaml(content: bytes, draw: random.Random) -> bytes:
    depth = draw.choice([10, 1000, 30_000])
    return content + draw.choice(["[", "- ", "? ", "{a: ", "&a [", "- - "]).encode() * depth


# ---- safetensors


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def in_order(content: bytes) -> bytes:
    """The same file with its header in alphabetical order, which safetensors draws at random."""
    header, rest = split_safetensors(content)
    return _with_header(json.dumps(header, sort_keys=True).encode(), rest)


def _with_header(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def change_header(content: bytes, draw: random.Random) -> bytes | None:
    header, rest = split_safetensors(content)
    try:
        text = json.dumps(change_tree(header, draw)).encode("utf-8", "surrogatepass")
    except ValueError:
        return None
    return _with_header(text, rest)


def change_metadata(content: bytes, draw: random.Random) -> bytes | None:
    """Change the JSON that is in a text of the header, and leave all of safetensors' own as it is."""
    header, rest = split_safetensors(content)
    metadata = header.get("__metadata__", {})
    trees = [name for name, text in metadata.items() if text[:1] in ("{", "[")]
    if not trees:
        return None
    name = draw.choice(trees)
    changed = change_json(metadata[name].encode(), draw)
    if changed is None:
        return None
    metadata[name] = changed.decode("utf-8", "surrogatepass")
    return _with_header(json.dumps(header).encode("utf-8", "surrogatepass"), rest)


def change_header_text(content: bytes, draw: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = draw.choice([*BYTES, *TEXT])(content[8 : 8 + length], draw)
    return _with_header(header or b"", content[8 + length :])


def change_length(content: bytes, draw: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1])) + content[8:]


KINDS: dict[str, list[Strategy]] = {
    "bytes": BYTES,
    "text": [*BYTES, *TEXT, *TEXT],
    "json": [*BYTES, *TEXT, *[change_json] * 16, nest_json],
    "yaml": [*BYTES, *TEXT, *[change_yaml] * 16, nest_yaml],
    "safetensors": [*BYTES, *[change_header] * 6, *[change_metadata] * 6, change_header_text, change_length],
}


def mutants(content: bytes, kind: str, count: int, seed: object) -> Iterator[tuple[str, bytes]]:
    """`count` files that differ from `content`, each with a description; fewer differ in the same way twice.

    Args:
        content: of a file that is right.
        kind: one of `KINDS`.
        count: how many.
        seed: the same one gives the same files.
    """
    draw = random.Random(f"{seed}/{kind}")
    made = 0
    while made < count:
        strategy = draw.choice(KINDS[kind])
        changed = strategy(content, draw)
        if changed is not None and changed != content:
            made += 1
            yield f"{made} ({strategy.__name__})", changed
