"""The model that block sizes are chosen by, and what it chooses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastmask_kernels import configs
from fastmask_kernels.chips import CHIPS
from fastmask_kernels.configs import (
    L2_SHARE,
    ROW_MATMUL,
    ROW_MATMUL_T,
    ROW_OWNED_GRAD,
    ROW_TURN_GRAD,
    WAVE,
    Config,
    choose,
    programs_of,
    seconds,
)

H200, NO_GPU = CHIPS["sm_90"], torch.device("meta")  # which counts as an H200
OUTER = {"BM": [8192], "BN": [384]}


def config(BM: int, BN: int, BK: int, resident: int = 1) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK)), 8, 3, resident)


def time(programs: int, of: Config, multiprocessors: int = 100) -> float:
    return seconds(of, programs, OUTER, ("BK", 768), "half", H200, multiprocessors)


def test_waves() -> None:
    """One program more than there is room for takes a wave more; two that share a multiprocessor wait together."""
    alone, two = config(128, 128, 64), config(128, 128, 64, 2)
    wave = time(100, alone)
    tile = wave - WAVE
    assert time(101, alone) == pytest.approx(2 * wave)
    assert time(250, alone) == pytest.approx(3 * wave)
    assert time(200, two) == pytest.approx(2 * tile + WAVE)
    assert time(201, two) == pytest.approx(3 * tile + 2 * WAVE)
    assert time(100, two) == pytest.approx(wave)


def test_a_tile_is_bound_by_arithmetic_or_by_the_cache() -> None:
    """A step's FLOPs at the peak, or its bytes at what the cache gives to all that read, whichever is longer."""
    of = config(64, 64, 64)  # 32 FLOPs a byte
    by_cache = 12 * 64 * (64 + 64) * 2 / (L2_SHARE * H200.l2 / 100)
    assert time(100, of) == pytest.approx(by_cache + WAVE)
    assert time(60, of) == pytest.approx(0.6 * by_cache + WAVE)
    assert time(1, of) == pytest.approx(0.5 * by_cache + WAVE), "alone it reads twice its share at most"
    huge = config(1024, 1024, 64)
    assert time(100, huge) == pytest.approx(12 * 2 * 1024 * 1024 * 64 / (H200.flops_16bit / 100) + WAVE)


def test_programs() -> None:
    """Tiles of tokens are cut inside of each language, those of several weights inside of each weight."""
    of = config(128, 128, 64)
    assert programs_of(of, OUTER) == 64 * 3
    assert programs_of(of, {"BM": [8192], "BN": [384, 130, 1]}) == 64 * (3 + 2 + 1)
    assert programs_of(of, OUTER, segments=8) == 68 * 3
    assert programs_of(of, {"BM": [64], "BN": [128]}, segments=8) == 8, "every language has a tile, however short"
    assert programs_of(of, {"BN": [384], "BK": [768]}, pieces=8) == 3 * 12 * 8


def blocks(found: Config) -> tuple[int, ...]:
    return (*(size for name, size in found.blocks if name != "GROUP"), found.num_stages)


# BM, BN, BK and stages on an H200: (tokens, live rows of each weight, columns), segments of a batch.
DECISIONS = {
    "BERT-base, Q, K and V": (ROW_MATMUL, {"BM": [8192], "BN": [384] * 3}, ("BK", 768), 9, (256, 128, 64, 4)),
    "BERT-base, their dX": (ROW_MATMUL_T, {"BM": [8192], "BK": [768]}, ("BN", 3 * 384), 9, (128, 64, 256, 5)),
    "BERT-base, one of them": (ROW_MATMUL, {"BM": [8192], "BN": [384]}, ("BK", 768), 9, (256, 128, 64, 4)),
    "BERT-base, FFN": (ROW_MATMUL, {"BM": [8192], "BN": [1536]}, ("BK", 768), 9, (256, 128, 64, 4)),
    "4096 x 4096": (ROW_MATMUL, {"BM": [16384], "BN": [2048]}, ("BK", 4096), 9, (256, 128, 64, 4)),
    "4096 x 4096, dX": (ROW_MATMUL_T, {"BM": [16384], "BK": [4096]}, ("BN", 2048), 9, (128, 64, 256, 5)),
    "two to a multiprocessor": (ROW_MATMUL, {"BM": [1024], "BN": [2048]}, ("BK", 768), 9, (128, 128, 64, 3)),
    "few tokens": (ROW_MATMUL, {"BM": [128], "BN": [384]}, ("BK", 768), 9, (64, 64, 64, 4)),
}


@pytest.mark.parametrize(("table", "outer", "inner", "segments", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_decisions(table, outer, inner, segments, expected) -> None:  # type: ignore[no-untyped-def]
    """A change of the model or of a table changes what is launched: whoever makes it sees where."""
    found = choose(table, NO_GPU, "half", True, outer, inner, segments=segments)
    assert blocks(found) == expected
    times = {
        other: seconds(other, programs_of(other, outer, 1, segments), outer, inner, "half", H200, H200.multiprocessors)
        for other in table["sm_90", "half"][:-1]
    }
    assert times[found] == min(times.values())


def dividing(unit: int) -> Callable[[Config], bool]:
    return lambda config: unit % config["BN"] == 0


def test_decisions_of_weight_gradients() -> None:
    """Blocks of dW that one program owns divide a head; in turns each language has programs of its own."""
    heads = {"BN": [768] * 3, "BK": [768]}
    assert blocks(choose(ROW_OWNED_GRAD, NO_GPU, "half", True, heads, ("BM", 4096), usable=dividing(64))) == (
        64,
        64,
        256,
        3,
    )
    wide = {"BN": [4096], "BK": [4096]}
    assert blocks(choose(ROW_OWNED_GRAD, NO_GPU, "half", True, wide, ("BM", 8192), usable=dividing(128))) == (
        64,
        128,
        256,
        3,
    )
    for unit in (64, 192, 320):
        for (chip, kind), entries in ROW_OWNED_GRAD.items():
            assert any(unit % entry["BN"] == 0 for entry in entries[:-1] or entries), f"{chip} {kind}: units of {unit}"
            assert unit % entries[-1]["BN"] == 0
    neurons = {"BN": [1536], "BK": [768]}
    assert blocks(choose(ROW_TURN_GRAD, NO_GPU, "half", True, neurons, ("BM", 910), pieces=9)) == (64, 128, 256, 5)


def test_the_devices_own_multiprocessors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small GPU is given the small tiles that a large one needs to be busy."""
    few = {"BM": [1024], "BN": [768]}
    assert blocks(choose(ROW_MATMUL, NO_GPU, "half", True, few, ("BK", 768)))[:2] == (128, 128)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 12)
    assert blocks(choose(ROW_MATMUL, NO_GPU, "half", True, few, ("BK", 768)))[:2] == (256, 128)


def test_unaligned_sizes() -> None:
    """Rows that begin anywhere are copied element by element, which large tiles have no registers for."""
    for table in (ROW_MATMUL, ROW_MATMUL_T, ROW_TURN_GRAD, ROW_OWNED_GRAD):
        outer = {"BM": [8192], "BN": [385]} if table is ROW_MATMUL else {"BN": [385], "BK": [771]}
        found = choose(table, NO_GPU, "half", False, outer, ("BM", 8192), segments=9)
        assert found == table["sm_90", "half"][-1]
