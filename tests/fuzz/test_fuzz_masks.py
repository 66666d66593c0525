"""Masks files with something wrong in them: none is read as other masks than were saved."""

from __future__ import annotations

import torch
from mutations import in_order, mutants
from verdicts import Verdicts

from fastmask import Subnetworks
from fastmask.files import read_metadata


def test_masks(count, tmp_path):
    """1,000 damaged files: an error that names the file, or the very masks and notes that were saved."""
    generator = torch.Generator().manual_seed(0)

    def keep(*shape):
        return torch.rand(3, *shape, generator=generator) < 0.5

    subnets = Subnetworks(["de", "språk", "日本"], keep(2, 5), keep(2, 9), {"encoder.a": keep(3, 7)})
    path, verdicts = tmp_path / "masks.safetensors", Verdicts()
    subnets.save(path, {"made_from": '{"runs": ["a", "b"], "seeds": 2}'})
    original, notes = in_order(path.read_bytes()), read_metadata(path)

    def read():
        return Subnetworks.load(path), read_metadata(path)

    for what, content in mutants(original, "safetensors", count, "masks"):
        path.write_bytes(content)
        verdicts.reading(what, read, lambda: (subnets, notes), path)
    verdicts.check(least=count // 2)
