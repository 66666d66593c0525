"""Block sizes of the row kernels, and the choice among them.

BM is a number of tokens, BN of live rows, BK of columns of the weight, whichever of them a kernel sums over. `GROUP` is
how many token tiles are walked together before the next columns, so that what they share is still in the L2 cache.
Each list goes from the largest tile to the smallest; the last is for sizes that allow no 16-byte copies. The sixth
number is how many programs a multiprocessor holds, as `compile_report` says; the last, never weighed, has none.

`num_stages` of the kernels that follow an index inside their loop counts the index too: 5 keeps three tiles in flight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmask_kernels.chips import chip_of, multiprocessors
from fastmask_kernels.configs import Config
from fastmask_kernels.cost_model import programs_of, seconds
from fastmask_kernels.limits import CHIPS

__all__ = [
    "ROW_MATMUL", "ROW_MATMUL_T", "ROW_OWNED_GRAD", "ROW_TURN_GRAD", "TABLES", "Table", "choose", "expected_residents",
    "kind_of",
]  # fmt: skip

Table = dict[tuple[str, str], list[Config]]


def _blocks(BM: int, BN: int, BK: int, num_warps: int, num_stages: int, resident: int = 1) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK)), num_warps, num_stages, resident)


def _config(BM: int, BN: int, BK: int, num_warps: int, num_stages: int, resident: int = 1) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK), ("GROUP", 8)), num_warps, num_stages, resident)


# "half": activations of 2 bytes and a weight of the same type; "master": the same with a float32 weight; "tf32" and
# "ieee": float32 throughout.
ROW_MATMUL: Table = {
    ("sm_80", "half"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3, 3), _config(64, 64, 32, 4, 3)],
    ("sm_80", "master"): [_config(128, 64, 64, 8, 3), _config(64, 64, 64, 4, 3, 3), _config(64, 64, 32, 4, 3)],
    ("sm_90", "half"): [
        _config(256, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 3, 2),
        _config(64, 64, 64, 4, 4, 3),
        _config(64, 64, 32, 4, 3),
    ],
    ("sm_90", "master"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3, 4), _config(64, 64, 32, 4, 3)],
    ("sm_100", "half"): [
        _config(256, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 4),
        _config(128, 128, 64, 8, 3, 2),
        _config(64, 64, 64, 4, 4, 3),
        _config(64, 64, 32, 4, 3),
    ],
    ("sm_100", "master"): [_config(128, 128, 64, 8, 3, 2), _config(64, 64, 64, 4, 3, 3), _config(64, 64, 32, 4, 3)],
    ("gfx942", "half"): [_config(256, 128, 32, 8, 2), _config(64, 64, 64, 4, 2, 4), _config(64, 64, 32, 4, 2)],
    ("gfx942", "master"): [_config(128, 128, 32, 8, 2), _config(64, 64, 32, 4, 2)],
    **{(chip, "tf32"): [_config(128, 64, 32, 8, 3), _config(64, 64, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_config(64, 64, 16, 8, 3, 2), _config(32, 32, 16, 4, 2)] for chip in CHIPS},
    ("gfx942", "ieee"): [_config(64, 64, 16, 8, 2, 2), _config(32, 32, 16, 4, 2)],
}

ROW_MATMUL_T: Table = {
    ("sm_80", "half"): [_config(128, 32, 128, 8, 5), _config(64, 64, 64, 4, 4, 3), _config(64, 32, 64, 4, 3)],
    ("sm_80", "master"): [_config(128, 32, 128, 8, 5), _config(64, 32, 64, 4, 4, 4), _config(64, 32, 64, 4, 3)],
    ("sm_90", "half"): [
        _config(128, 64, 256, 8, 5),
        _config(128, 64, 128, 8, 5),
        _config(64, 64, 64, 4, 5, 4),
        _config(64, 32, 64, 4, 3),
    ],
    ("sm_90", "master"): [_config(128, 64, 128, 8, 5), _config(64, 64, 64, 4, 5, 3), _config(64, 32, 64, 4, 3)],
    ("sm_100", "half"): [
        _config(128, 64, 256, 8, 5),
        _config(128, 64, 128, 8, 5),
        _config(64, 64, 64, 8, 5, 4),
        _config(64, 32, 64, 4, 3),
    ],
    ("sm_100", "master"): [_config(128, 64, 128, 8, 5), _config(64, 64, 64, 4, 5, 3), _config(64, 32, 64, 4, 3)],
    ("gfx942", "half"): [_config(128, 32, 128, 8, 2, 2), _config(64, 32, 64, 4, 2)],
    ("gfx942", "master"): [_config(128, 32, 128, 8, 2, 2), _config(64, 32, 64, 4, 2)],
    **{(chip, "tf32"): [_config(64, 32, 64, 4, 3, 3), _config(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_config(64, 16, 64, 8, 2, 2), _config(32, 16, 32, 4, 2)] for chip in CHIPS},
}

ROW_TURN_GRAD: Table = {
    ("sm_80", "half"): [_blocks(64, 128, 128, 8, 5), _blocks(64, 64, 64, 4, 5, 4), _blocks(32, 64, 64, 4, 3)],
    ("sm_90", "half"): [
        _blocks(64, 128, 256, 8, 5),
        _blocks(64, 128, 128, 8, 5, 2),
        _blocks(64, 64, 64, 4, 5, 4),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("sm_100", "half"): [
        _blocks(64, 128, 256, 8, 5),
        _blocks(64, 128, 128, 8, 5, 2),
        _blocks(64, 64, 64, 4, 5, 4),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("gfx942", "half"): [_blocks(32, 128, 128, 8, 2, 2), _blocks(32, 64, 64, 4, 2)],
    **{(chip, "tf32"): [_blocks(32, 64, 64, 8, 3, 3), _blocks(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_blocks(16, 64, 64, 4, 2, 5), _blocks(16, 32, 32, 8, 2)] for chip in CHIPS},
}

ROW_OWNED_GRAD: Table = {
    ("sm_80", "half"): [_blocks(64, 64, 128, 4, 3, 2), _blocks(64, 64, 64, 4, 3, 3), _blocks(32, 64, 64, 8, 3)],
    ("sm_90", "half"): [
        _blocks(64, 128, 256, 8, 3),
        _blocks(64, 128, 128, 8, 3, 2),
        _blocks(64, 64, 256, 8, 3),
        _blocks(64, 64, 128, 4, 3, 3),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("sm_100", "half"): [
        _blocks(64, 128, 256, 8, 3),
        _blocks(64, 128, 128, 8, 3, 2),
        _blocks(64, 64, 256, 8, 3),
        _blocks(64, 64, 128, 4, 3, 3),
        _blocks(32, 64, 64, 4, 3),
    ],
    ("gfx942", "half"): [_blocks(32, 64, 128, 4, 2, 2), _blocks(32, 64, 64, 4, 2)],
    **{(chip, "tf32"): [_blocks(32, 64, 32, 4, 3, 5), _blocks(32, 32, 32, 4, 2)] for chip in CHIPS},
    ("gfx942", "tf32"): [_blocks(32, 64, 32, 4, 3, 2), _blocks(32, 32, 32, 4, 2)],
    # Larger ones spill a few bytes, each on another chip.
    **{(chip, "ieee"): [_blocks(16, 32, 32, 8, 2, 4)] for chip in CHIPS},
}


TABLES = {
    "row_matmul_kernel": ROW_MATMUL,
    "row_matmul_t_kernel": ROW_MATMUL_T,
    "row_turn_grad_kernel": ROW_TURN_GRAD,
    "row_owned_grad_kernel": ROW_OWNED_GRAD,
}  # by the kernel that is launched with them


def expected_residents(kernel: str, chip: str, blocks: dict[str, int], num_warps: int, num_stages: int) -> int:
    """How many programs of such a launch the tables take a multiprocessor to hold; 0 where it is in none."""
    entries = [config for (own, _), configs in TABLES.get(kernel, {}).items() if own == chip for config in configs]
    return min(
        (
            config.resident
            for config in entries
            if (config.num_warps, config.num_stages) == (num_warps, num_stages)
            and all(blocks[name] == size for name, size in config.blocks)
        ),
        default=0,
    )


def kind_of(x: Tensor, weight_dtype: torch.dtype | None, allow_tf32: bool) -> str:
    """Which of a chip's lists fits; `weight_dtype` None where a kernel reads no weight."""
    if x.dtype == torch.float32:
        return "tf32" if allow_tf32 else "ieee"
    return "half" if weight_dtype in (None, x.dtype) else "master"


def choose(
    table: Table, device: torch.device, kind: str, fits: bool, outer: dict[str, list[int]], inner: tuple[str, int], *,
    pieces: int = 1, segments: int = 1, usable: Callable[[Config], bool] = lambda config: True,
) -> Config:  # fmt: skip
    """The config of the least predicted time (`cost_model.seconds`); of equals the first, the largest tile.

    Args:
        table: candidates by chip and kind, from the largest tile to the smallest, then the one for unaligned sizes.
        device: where it runs.
        kind: as `kind_of`.
        fits: whether rows begin at multiples of 16 elements.
        outer: the two dimensions that are cut into programs, by block name, with their sizes for each weight.
        inner: the dimension that a program sums over, and how far.
        pieces: programs for each of those tiles (languages, where each has programs of its own).
        segments: languages among the tokens; each is cut into tiles on its own.
        usable: which configs may be taken.
    """
    chip = chip_of(device)
    candidates, n = table[chip, kind], multiprocessors(device)
    if not fits:
        return candidates[-1]

    def cost(config: Config) -> float:
        return seconds(config, programs_of(config, outer, pieces, segments), outer, inner, kind, CHIPS[chip], n)

    return min((config for config in candidates[:-1] or candidates if usable(config)), key=cost)
