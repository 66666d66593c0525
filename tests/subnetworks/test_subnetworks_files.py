"""Files of subnetworks: what was saved comes back, and what was not is refused with the file's name."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hang import no_hang
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typed_command import failure_of, output_of

import fastmask.files as files
from fastmask import Subnetworks


@settings(max_examples=30, deadline=None)
@given(
    L=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 33)),
    seed=st.integers(0, 99),
    parts=st.sets(st.sampled_from(["heads", "neurons", "weights"]), min_size=1),
)
def test_files_round_trip(L, shape, seed, parts, tmp_path_factory):
    """A saved mask comes back as it was, with its metadata; nothing else is left in the folder."""
    generator = torch.Generator().manual_seed(seed)

    def keep():
        return torch.rand(L, *shape, generator=generator) < 0.5

    subnets = Subnetworks(
        [f"språk-{i}" for i in range(L)],
        keep() if "heads" in parts else None,
        keep() if "neurons" in parts else None,
        {"a.b": keep(), "c": keep()} if "weights" in parts else None,
    )
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    subnets.save(path, {"note": "x"})
    assert Subnetworks.load(path) == subnets
    assert files.read_metadata(path)["note"] == "x"
    assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"]


def test_many_languages(tmp_path):
    """What can be made can be saved, and read again, however many languages it has."""
    subnets = Subnetworks([str(i) for i in range(10_001)], torch.ones(10_001, 1, 3, dtype=torch.bool))
    subnets.save(tmp_path / "masks.safetensors")
    assert Subnetworks.load(tmp_path / "masks.safetensors") == subnets


def masks():
    """Two languages, 2 x 6 heads and a module of 3 x 5 weights: neither fills its last byte."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(2, 2, 6, generator=generator) < 0.5
    return Subnetworks(["de", "en"], heads, weights={"a.b": torch.rand(2, 3, 5, generator=generator) < 0.5})


def crafted(path, content=None, tensors=None, **header):
    """Write a masks file whose checksum is right, with other content, tensors or header than `save` would write."""
    masks().save(path)
    own_tensors, own_header = files.read_sealed(path)
    own_content = json.loads(own_header["content"])
    own_content.update(content or {})
    own_tensors.update(tensors or {})
    text = {"content": json.dumps(own_content), **header}
    kept = {name: tensor for name, tensor in own_tensors.items() if tensor is not None}
    files.write_sealed(path, kept, {**own_header, **text})
    return path


def heads(**shape):
    return {"shapes": {"heads": shape.get("heads", [2, 2, 6]), "weights.a.b": shape.get("weights", [2, 3, 5])}}


BYTES = torch.zeros(2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": "1"}, "has format version 1 (expected 2"),
        ({"version": "3"}, "has format version 3 (expected 2"),
        ({"version": "٢"}, "has format version ٢ (expected 2"),
        ({"version": " 2"}, "has format version 2 (expected 2"),
        ({"version": "two"}, "has format version two (expected 2"),
        ({"format": "other"}, "not one of fastmask subnetworks"),
        ({"content": {"languages": ["de", "de"]}}, "expected distinct language names"),
        ({"content": {"languages": ["de", ""]}}, "not empty"),
        ({"content": {"languages": ["de", "e\nn"]}}, "control characters"),
        ({"content": {"languages": ["de", 3]}}, "languages.1: Input should be a valid string, given 3"),
        ({"content": {"languages": ["de", None]}}, "languages.1: Input should be a valid string"),
        ({"content": {"languages": "de"}}, "languages: Input should be a valid"),
        ({"content": {"languages": []}}, "languages: "),
        ({"content": {"languages": ["de"]}}, "has masks for 2 languages, expected 1"),
        ({"content": {"languages": [f"x{i}" for i in range(100_000)]}}, "for 2 languages, expected 100000"),
        ({"content": {"more": 1}}, "more: Extra inputs are not permitted"),
        ({"content": heads(heads=[2, 2, 6.0])}, "shapes.heads.2: Input should be a valid integer, given 6.0"),
        ({"content": heads(heads=[True, 2, 6])}, "shapes.heads.0: Input should be a valid integer, given True"),
        ({"content": heads(heads=[2, 2, "6"])}, "shapes.heads.2: Input should be a valid integer, given '6'"),
        ({"content": heads(heads=[2, 12])}, "shapes.heads.2: Field required"),
        ({"content": heads(heads=[2, 2, -6])}, "shapes.heads.2: Input should be greater than or equal to 1"),
        ({"content": heads(heads=[2, 0, 10**12])}, "shapes.heads.1: Input should be greater than or equal to 1"),
        ({"content": heads(heads=[2, 3, 9])}, "is damaged: "),
        ({"tensors": {"heads": None}}, "is damaged: 'heads'"),
        ({"tensors": {"heads": BYTES.to(torch.int32)}}, "is damaged: "),
    ],
)
def test_content(tmp_path, changes, problem):
    """Languages, shapes, dtypes and sizes are checked before anything is made of them; numbers are not converted."""
    path = crafted(tmp_path / "masks.safetensors", **changes)
    with pytest.raises(files.FileError) as error, no_hang():
        Subnetworks.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_content_that_is_no_record(tmp_path, content):
    path = tmp_path / "masks.safetensors"
    files.write_sealed(path, {}, {"format": "fastmask.subnetworks", "version": "2", "content": content})
    with pytest.raises(files.FileError, match=r"masks\.safetensors: "):
        Subnetworks.load(path)


class TestBadFiles:
    """Every error names the file."""

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
            Subnetworks.load(tmp_path / "no.safetensors")

    def test_truncated(self, tmp_path):
        path = tmp_path / "masks.safetensors"
        masks().save(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(files.FileError, match="is not a safetensors file, or is truncated"):
            Subnetworks.load(path)

    def test_another_kind_of_file(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(files.FileError, match="not one of fastmask subnetworks"):
            Subnetworks.load(path)

    def test_one_bit_of_a_mask(self, tmp_path):
        """A head that was switched off on the disk is not read as switched off."""
        path = tmp_path / "masks.safetensors"
        masks().save(path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(files.FileError, match="is damaged: its content is not what its checksum says"):
            Subnetworks.load(path)


@pytest.mark.parametrize("metadata", [{"content": "x"}, {"version": "9"}, {"format": "x"}, {"sha256": "x"}, {"a": 1}])
def test_metadata_cannot_be_the_file_s_own(tmp_path, metadata):
    """Metadata that would overwrite what the file says of itself, or is no text, is refused and nothing written."""
    with pytest.raises(ValueError, match="expected names and texts"):
        masks().save(tmp_path / "masks.safetensors", metadata)
    assert os.listdir(tmp_path) == []


HOSTILE = [
    "../x",
    "/etc/passwd",
    "[/b]",
    "[bold red]x",
    ":smile:",
    "%s",
    "{0}",
    "<script>",
    "a,b",
    "-1",
    "no",
]


def test_hostile_names(tmp_path, capsys):
    """Names that lead out of the folder or are markup are shown as they are in the table."""
    path = tmp_path / "in" / "masks.safetensors"
    keep = torch.rand(len(HOSTILE), 2, 4) < 0.5
    Subnetworks(HOSTILE, keep, keep).save(path, {"../y": "[/b]"})
    assert list(Subnetworks.load(path).languages) == HOSTILE
    shown = output_of(capsys, "masks", path)
    for name in HOSTILE:
        assert f"│ {name} " in shown
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_the_command_names_the_file(tmp_path, capsys):
    """What `fastmask masks` says of a crafted file is one line with its name."""
    path = crafted(tmp_path / "masks.safetensors", {"languages": ["de", "\x1b[2J[/b]"]})
    assert failure_of(capsys, "masks", path).startswith(f"fastmask masks: error: {path}: ")
