"""Delta files with something wrong in them: none is read as another change than was saved."""

from __future__ import annotations

import torch
from mutations import in_order, mutants
from verdicts import Verdicts

from fastmask import Delta
from fastmask.deltas import Change, Part
from fastmask.live import live_of
from tests.core.oracle import KINDS, random_mask


def test_deltas(count, tmp_path):
    """Damaged files: an error that names the file, or the very change that was saved."""
    after = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    lives = {kind: live_of(random_mask(kind, 4, 8, 12, unit=2), [0]) for kind in KINDS}
    parts = {kind: Part(live, (8, 12), "of the base", live.read(after).flatten()) for kind, live in lives.items()}
    delta = Delta([Change("språk", parts)])
    path, verdicts = tmp_path / "delta.safetensors", Verdicts()
    delta.save(path)
    original = in_order(path.read_bytes())
    for what, content in mutants(original, "safetensors", count, "deltas"):
        path.write_bytes(content)
        verdicts.reading(
            what, lambda: [c.digest for c in Delta.load(path).changes], lambda: [delta.changes[0].digest], path
        )
    verdicts.check(least=count // 2)
