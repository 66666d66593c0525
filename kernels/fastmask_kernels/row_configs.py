"""Block sizes of the row kernels, and the choice among them.

BM is a number of tokens, BN of live rows, BK of columns of the weight, whichever of them a kernel sums over. `GROUP` is
how many token tiles are walked together before the next columns, so that what they share is still in the L2 cache.
Each list goes from the largest tile to the smallest; the last is for sizes that allow no 16-byte copies.

`num_stages` of the kernels that follow an index inside their loop counts the index too: 5 keeps three tiles in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask_kernels.configs import Config

__all__ = ["CHIPS", "ROW_MATMUL", "ROW_MATMUL_T", "ROW_WEIGHT_GRAD", "Table", "choose", "kind_of"]

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
MULTIPROCESSORS = 132  # of an H200; the others are near enough (108, 148, 304)

Table = dict[tuple[str, str], list[Config]]


def _blocks(BM: int, BN: int, BK: int, num_warps: int, num_stages: int) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK)), num_warps, num_stages)


def _config(BM: int, BN: int, BK: int, num_warps: int, num_stages: int) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK), ("GROUP", 8)), num_warps, num_stages)


# "half": activations of 2 bytes and a weight of the same type; "master": the same with a float32 weight; "tf32" and
# "ieee": float32 throughout.
ROW_MATMUL: Table = {
    ("sm_80", "half"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3), _config(64, 64, 32, 4, 3)],
    ("sm_80", "master"): [_config(128, 64, 64, 8, 3), _config(64, 64, 64, 4, 3), _config(64, 64, 32, 4, 3)],
    ("sm_90", "half"): [
        _config(256, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 4),
        _config(64, 64, 64, 4, 4),
        _config(64, 64, 32, 4, 3),
    ],
    ("sm_90", "master"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3), _config(64, 64, 32, 4, 3)],
    ("sm_100", "half"): [
        _config(256, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 4),
        _config(64, 64, 64, 4, 4),
        _config(64, 64, 32, 4, 3),
    ],
    ("sm_100", "master"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3), _config(64, 64, 32, 4, 3)],
    ("gfx942", "half"): [_config(256, 128, 32, 8, 2), _config(64, 64, 64, 4, 2), _config(64, 64, 32, 4, 2)],
    ("gfx942", "master"): [_config(128, 128, 32, 8, 2), _config(64, 64, 32, 4, 2)],
    **{(chip, "tf32"): [_config(128, 64, 32, 8, 3), _config(64, 64, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_config(64, 64, 16, 8, 3), _config(32, 32, 16, 4, 2)] for chip in CHIPS},
    ("gfx942", "ieee"): [_config(64, 64, 16, 8, 2), _config(32, 32, 16, 4, 2)],
}

ROW_MATMUL_T: Table = {
    ("sm_80", "half"): [_config(128, 32, 128, 8, 5), _config(64, 64, 64, 4, 4), _config(64, 32, 64, 4, 3)],
    ("sm_80", "master"): [_config(128, 32, 128, 8, 5), _config(64, 32, 64, 4, 4), _config(64, 32, 64, 4, 3)],
    ("sm_90", "half"): [
        _config(128, 64, 256, 8, 5),
        _config(128, 64, 128, 8, 5),
        _config(64, 64, 64, 4, 5),
        _config(64, 32, 64, 4, 3),
    ],
    ("sm_90", "master"): [_config(128, 64, 128, 8, 5), _config(64, 64, 64, 4, 5), _config(64, 32, 64, 4, 3)],
    ("sm_100", "half"): [
        _config(128, 64, 256, 8, 5),
        _config(128, 64, 128, 8, 5),
        _config(64, 64, 64, 8, 5),
        _config(64, 32, 64, 4, 3),
    ],
    ("sm_100", "master"): [_config(128, 64, 128, 8, 5), _config(64, 64, 64, 4, 5), _config(64, 32, 64, 4, 3)],
    ("gfx942", "half"): [_config(128, 32, 128, 8, 2), _config(64, 32, 64, 4, 2)],
    ("gfx942", "master"): [_config(128, 32, 128, 8, 2), _config(64, 32, 64, 4, 2)],
    **{(chip, "tf32"): [_config(64, 32, 64, 4, 3), _config(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_config(64, 16, 64, 4, 2), _config(32, 16, 32, 4, 2)] for chip in CHIPS},
    ("sm_80", "ieee"): [_config(64, 16, 64, 8, 2), _config(32, 16, 32, 4, 2)],
}

ROW_WEIGHT_GRAD: Table = {
    ("sm_80", "half"): [_blocks(64, 128, 128, 8, 5), _blocks(64, 64, 64, 4, 5), _blocks(32, 64, 64, 4, 3)],
    ("sm_90", "half"): [
        _blocks(64, 128, 256, 8, 5),
        _blocks(64, 128, 128, 8, 5),
        _blocks(64, 64, 64, 4, 5),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("sm_100", "half"): [
        _blocks(64, 128, 256, 8, 5),
        _blocks(64, 128, 128, 8, 5),
        _blocks(64, 64, 64, 4, 5),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("gfx942", "half"): [_blocks(32, 128, 128, 8, 2), _blocks(32, 64, 64, 4, 2)],
    **{(chip, "tf32"): [_blocks(32, 64, 64, 8, 3), _blocks(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_blocks(16, 64, 64, 4, 2), _blocks(16, 32, 32, 8, 2)] for chip in CHIPS},
}


def kind_of(x: Tensor, weight_dtype: torch.dtype | None, allow_tf32: bool) -> str:
    """Which of a chip's lists fits; `weight_dtype` None where a kernel reads no weight."""
    if x.dtype == torch.float32:
        return "tf32" if allow_tf32 else "ieee"
    return "half" if weight_dtype in (None, x.dtype) else "master"


def choose(candidates: list[Config], tiled: dict[str, int], pieces: int, per_segment: int, aligned: bool) -> Config:
    """The largest tile that still gives every multiprocessor a program.

    Args:
        candidates: from the largest tile to the smallest, then the one for unaligned sizes.
        tiled: how many elements there are of each dimension that is cut into programs, by block name.
        pieces: programs for each of those tiles (languages, where each has programs of its own).
        per_segment: tokens a language has on average; a token tile should not be mostly padding.
        aligned: whether rows begin at multiples of 16 elements.
    """
    if not aligned:
        return candidates[-1]
    usable = candidates[:-1] or candidates
    for config in usable:
        programs = pieces
        for name, size in tiled.items():
            programs *= -(-size // config[name])
        if programs >= MULTIPROCESSORS and ("BM" not in tiled or 4 * config["BM"] <= per_segment):
            return config
    return usable[-1]
