"""What is counted on paper is what the library's data structures really take."""

from __future__ import annotations

import pytest
import torch

import fastmask as fm
from benchmarks.paper import Decoder, activation_bytes, mask_bytes, tables

SMALL = Decoder(hidden=128, ffn=256, heads=4, layers=3, vocabulary=64, languages=5)
WEIGHTS = 4 * 128 * 128 + 3 * 128 * 256


def test_masks_by_hand():
    """A paper that nobody can check by running it is wrong."""
    found = mask_bytes(SMALL)
    own = found["heads + neurons"]
    assert own["booleans"] == 3 * 5 * (4 + 256)
    # Each of four projections lists 64 live rows or columns of 128 for each language, each of three lists 128 of 256;
    # and how many there are.
    assert own["attached"] == 3 * 8 * 5 * (4 * 64 + 3 * 128 + 7)
    single = found["single weights"]
    assert single["booleans"] == 3 * 5 * WEIGHTS
    assert single["attached"] == pytest.approx(3 * 5 * WEIGHTS / 8, rel=0.01)
    assert found["blocks of 64"]["booleans"] == 3 * 5 * WEIGHTS / 64**2


def test_meta_masks_are_as_large_as_real_ones():
    """Masks of a layer without memory are counted differently."""
    model = SMALL.one_layer("cpu")
    fm.attach(model, fm.Subnetworks.random(model.config, SMALL.names(), 0.5, seed=0, units="both"))
    real = sum(layer.mask.nbytes for layer in model.modules() if isinstance(layer, fm.MaskedLinear))
    assert mask_bytes(SMALL)["heads + neurons"]["attached"] == 3 * real


def test_activations_are_proportional_to_tokens():
    """What is counted on 64 tokens says nothing of 8192."""
    few, more = activation_bytes(SMALL, 32), activation_bytes(SMALL, 64)
    assert few["fastmask"] < few["dense"]
    for name in few:
        assert more[name] == pytest.approx(few[name], rel=0.02)
    assert torch.get_default_dtype() == torch.float32


def test_tables():
    """A table lacks a row, or the file it is put into has lost its marks."""
    text = tables(SMALL)
    assert text.count("\n| 64 |") == 1
    for unit in ("heads + neurons", "blocks of 64", "single weights"):
        assert f"| {unit} | " in text
    from benchmarks.paper import BEGIN, END, PAPER

    page = PAPER.read_text(encoding="utf-8")
    assert page.index(BEGIN) < page.index("| single weights |") < page.index(END)
