"""Tensors on disk: what comes back is what was written, or an error that names the file."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from hang import no_hang
from safetensors.torch import save_file

import fastmask.files as files

TENSORS = {
    "bools": torch.tensor([[True, False, True]]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "floats": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "halves": torch.randn(5).bfloat16(),
    "nothing": torch.zeros(0, 4),
    "one": torch.tensor(5),
}


def crafted(path, header, data=b"", length=None):
    """Write a safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_sealed_files_round_trip(tmp_path):
    """Tensors of every kind and the header come back; views are written as they look."""
    tensors = {
        **TENSORS,
        "view": torch.arange(6).view(2, 3).t(),
        "again": TENSORS["bytes"],
        "part": TENSORS["bytes"][2:],
    }
    files.write_sealed(tmp_path / "a", tensors, {"note": "x", "språk": "ja"})
    back, header = files.read_sealed(tmp_path / "a")
    assert header == {"note": "x", "språk": "ja"}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_every_flipped_bit_is_seen(tmp_path):
    """A sealed file with one bit changed, anywhere, is refused (or reads the same, where JSON has white space)."""
    path = tmp_path / "a"
    tensors = {name: TENSORS[name] for name in ("bools", "bytes")}
    files.write_sealed(path, tensors, {"note": "x"})
    content = path.read_bytes()
    accepted, complaints = 0, []
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            back, header = files.read_sealed(path)
        except files.FileError as error:
            complaints.append(str(error))
            continue
        accepted += 1
        assert header == {"note": "x"}
        assert all(back[name].equal(tensor) for name, tensor in tensors.items())
    assert accepted < 64
    assert all(complaint.startswith(f"{path}: ") for complaint in complaints)


def test_chunks_that_moved(tmp_path):
    """Bytes cut out, doubled or put elsewhere are seen."""
    path, draw = tmp_path / "a", random.Random(0)
    files.write_sealed(path, TENSORS, {"note": "x"})
    content = path.read_bytes()
    for _ in range(300):
        start, length, to = draw.randrange(len(content)), draw.randrange(1, 40), draw.randrange(len(content))
        chunk, rest = content[start : start + length], content[:start] + content[start + length :]
        changed = draw.choice([rest, rest[:to] + chunk + rest[to:], content[:to] + chunk + content[to:]])
        if changed == content:
            continue
        path.write_bytes(changed)
        with pytest.raises(files.FileError):
            files.read_sealed(path)


def test_a_file_without_a_seal(tmp_path):
    """Tensors of others have no checksum and are not taken for ours."""
    save_file({"x": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(files.FileError, match="checksum"):
        files.read_sealed(tmp_path / "a")
    assert files.read_tensors(tmp_path / "a")[0]["x"].tolist() == [1, 1]


U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({}, b"", 2**63),
        ({}, b"", 2**40),
        ({"a": {**U8, "shape": [2**40, 2**20]}}, b"abcd", None),
        ({"a": {**U8, "shape": [2**62]}}, b"abcd", None),
        ({"a": {**U8, "data_offsets": [4, 8]}}, b"abcdefgh", None),
        ({"a": {**U8, "data_offsets": [0, 2**62]}}, b"abcd", None),
        ({"a": U8}, b"abcdef", None),
        ({"a": U8}, b"abc", None),
        (b'{"__metadata__":' + b'{"a":' * 100_000, b"", None),
        ({"__metadata__": {"a": 1}}, b"", None),
        (b"\xff" * 20, b"", None),
        (b"", b"", None),
    ],
)
def test_bombs(tmp_path, header, data, length):
    """A header that promises more than there is, or what no file holds, is refused before any memory is taken."""
    path = crafted(tmp_path / "bomb", header, data, length)
    with pytest.raises(files.FileError) as error, no_hang():
        files.read_tensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_it_replaces_whole(tmp_path):
    """A sealed file keeps its permissions, and nothing else is left in its folder."""
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o640)
    files.write_sealed(path, TENSORS, {})
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
