"""Which block sizes a kernel is launched with: measured ones, or of a short list those that a model on paper prefers.

Chosen by chip, element size and shape; never by what is in a mask: dynamic subnetworks change masks every few steps,
and a launch must not depend on it. The model takes a product as waves of programs, each bound by arithmetic or by the
L2 cache. Its numbers are assumptions, not measurements; what it is for is to compare block sizes, and to say in advance
what a measurement is to be held against. Measured sizes, which `python -m fastmask_kernels.autotune` finds, are kept on
disk, by chip, kernel, dtypes and sizes.

Of row kernels, BM is a number of tokens, BN of live rows, BK of columns of the weight, whichever of them a kernel sums
over. `GROUP` is how many token tiles are walked together before the next columns, so that what they share is still in
the L2 cache. Each list goes from the largest tile to the smallest; the last is for sizes that allow no 16-byte copies.
The sixth number is how many programs a multiprocessor holds, as `compile_report` says; the last, never weighed, has
none. `num_stages` of the kernels that follow an index inside their loop counts the index too: 5 keeps three tiles in
flight.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from fastmask_kernels.chips import CHIPS, Chip, chip_of, multiprocessors
from fastmask_kernels.launching import forget
from fastmask_kernels.plan import Plan

__all__ = [
    "ELEMENT", "L2_SHARE", "ROW_MATMUL", "ROW_MATMUL_T", "ROW_OWNED_GRAD", "ROW_TURN_GRAD", "TABLES", "WAVE", "Config",
    "Table", "cache_file", "choose", "expected_residents", "kind_of", "problem", "programs_of", "remember", "seconds",
    "tuned",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        blocks: its constexpr block sizes by name.
        resident: programs that a multiprocessor holds at a time, by the registers and shared memory that the compiler
            reports.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    resident: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


# ---- the tables

Table = dict[tuple[str, str], list[Config]]


def _blocks(BM: int, BN: int, BK: int, num_warps: int, num_stages: int, resident: int = 1, **more: int) -> Config:
    return Config((("BM", BM), ("BN", BN), ("BK", BK), *more.items()), num_warps, num_stages, resident)


_config = partial(_blocks, GROUP=8)
_NEW = ("sm_90", "sm_100")  # they take the right operand of a product from shared memory

# "half": activations of 2 bytes and a weight of the same type; "master": the same with a float32 weight; "tf32" and
# "ieee": float32 throughout. Of two entries for one chip and kind the later counts.
ROW_MATMUL: Table = {
    ("sm_80", "half"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3, 3), _config(64, 64, 32, 4, 3)],
    ("sm_80", "master"): [_config(128, 64, 64, 8, 3), _config(64, 64, 64, 4, 3, 3), _config(64, 64, 32, 4, 3)],
    **{
        (chip, "half"): [
            _config(256, 128, 64, 8, 4),
            _config(128, 128, 64, 8, 4),
            _config(128, 128, 64, 8, 3, 2),
            _config(64, 64, 64, 4, 4, 3),
            _config(64, 64, 32, 4, 3),
        ]
        for chip in _NEW
    },
    ("sm_90", "master"): [_config(128, 128, 64, 8, 3), _config(64, 64, 64, 4, 3, 4), _config(64, 64, 32, 4, 3)],
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
    **{
        (chip, "half"): [
            _config(128, 64, 256, 8, 5),
            _config(128, 64, 128, 8, 5),
            _config(64, 64, 64, 4 if chip == "sm_90" else 8, 5, 4),
            _config(64, 32, 64, 4, 3),
        ]
        for chip in _NEW
    },
    **{
        (chip, "master"): [_config(128, 64, 128, 8, 5), _config(64, 64, 64, 4, 5, 3), _config(64, 32, 64, 4, 3)]
        for chip in _NEW
    },
    **{("gfx942", kind): [_config(128, 32, 128, 8, 2, 2), _config(64, 32, 64, 4, 2)] for kind in ("half", "master")},
    **{(chip, "tf32"): [_config(64, 32, 64, 4, 3, 3), _config(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_config(64, 16, 64, 8, 2, 2), _config(32, 16, 16, 4, 2)] for chip in CHIPS},
}

ROW_TURN_GRAD: Table = {
    ("sm_80", "half"): [_blocks(64, 128, 128, 8, 5), _blocks(64, 64, 64, 4, 5, 4), _blocks(32, 64, 64, 4, 3)],
    **{
        (chip, "half"): [
            _blocks(64, 128, 256, 8, 5),
            _blocks(64, 128, 128, 8, 5, 2),
            _blocks(64, 64, 64, 4, 5, 4),
            _blocks(32, 64, 64, 4, 3),
        ]
        for chip in _NEW
    },
    ("gfx942", "half"): [_blocks(32, 128, 128, 8, 2, 2), _blocks(32, 64, 64, 4, 2)],
    **{(chip, "tf32"): [_blocks(32, 64, 64, 8, 3, 3), _blocks(32, 32, 32, 4, 2)] for chip in CHIPS},
    **{(chip, "ieee"): [_blocks(16, 64, 64, 4, 2, 4), _blocks(16, 32, 32, 8, 2)] for chip in CHIPS},
}

ROW_OWNED_GRAD: Table = {
    ("sm_80", "half"): [_blocks(64, 64, 128, 4, 3, 2), _blocks(64, 64, 64, 4, 3, 3), _blocks(32, 64, 64, 8, 3)],
    **{
        (chip, "half"): [
            _blocks(64, 128, 256, 8, 3),
            _blocks(64, 128, 128, 8, 3, 2),
            _blocks(64, 64, 256, 8, 3),
            _blocks(64, 64, 128, 4, 3, 3),
            _blocks(32, 64, 64, 4, 3),
        ]
        for chip in _NEW
    },
    ("gfx942", "half"): [_blocks(32, 64, 128, 4, 2, 2), _blocks(32, 64, 64, 4, 2)],
    **{(chip, "tf32"): [_blocks(32, 64, 32, 4, 3, 4), _blocks(32, 32, 32, 4, 2)] for chip in CHIPS},
    ("gfx942", "tf32"): [_blocks(32, 64, 32, 4, 3, 2), _blocks(32, 32, 32, 4, 2)],
    # Larger ones spill a few bytes, each on another chip.
    **{(chip, "ieee"): [_blocks(16, 32, 32, 8, 2, 3 if chip == "gfx942" else 4)] for chip in CHIPS},
}

TABLES = {
    "row_matmul_kernel": ROW_MATMUL,
    "row_matmul_t_kernel": ROW_MATMUL_T,
    "row_turn_grad_kernel": ROW_TURN_GRAD,
    "row_owned_grad_kernel": ROW_OWNED_GRAD,
}  # by the kernel that is launched with them


def expected_residents(kernel: str, chip: str, blocks: dict[str, int], num_warps: int, num_stages: int) -> int:
    """How many programs of such a launch the tables take a multiprocessor to hold; 0 where it is in none."""
    launch = blocks | {"num_warps": num_warps, "num_stages": num_stages}
    entries = [config for (own, _), configs in TABLES.get(kernel, {}).items() if own == chip for config in configs]
    return min((config.resident for config in entries if config.options.items() <= launch.items()), default=0)


# ---- the model

L2_SHARE = 0.7  # of the theoretical rate of the L2 cache: what others measured of an H100 is 5.5 to 7 of 9 TB/s
WAVE = 3e-6  # seconds in which a wave's programs wait for their first tiles (four reads, each by the last) or write
ELEMENT = {"half": 2, "master": 3, "tf32": 4, "ieee": 4}  # bytes, on average over both operands


def programs_of(config: Config, outer: dict[str, list[int]], pieces: int = 1, segments: int = 1) -> int:
    """How many programs compute a result whose two dimensions are cut by the blocks that `outer` names.

    Tokens ("BM" there) are cut within each of `segments`, whose last tiles are half empty on average.
    """
    programs = float(pieces)
    for name, sizes in outer.items():
        cut = sum(ceil(size / config[name]) for size in sizes)
        programs *= max(segments, sizes[0] / config[name] + segments / 2) if name == "BM" and segments > 1 else cut
    return ceil(programs)


def seconds(
    config: Config, programs: int, outer: dict[str, list[int]], inner: tuple[str, int], kind: str, chip: Chip,
    multiprocessors: int,
) -> float:  # fmt: skip
    """The time of `programs`, each of which computes a tile and sums over `inner`: a block's name, and elements.

    A multiprocessor holds `config.resident` programs at a time; they share its rate, and wait for memory together.
    """
    (a, b), (name, length) = (config[block] for block in outer), inner
    intensity = 2 * a * b / (ELEMENT[kind] * (a + b))  # FLOPs for each byte that a step reads
    # Few programs find the cache less busy; but one multiprocessor alone reads about twice its share at most.
    readers = max(min(programs, multiprocessors), multiprocessors / 2)
    rate = min(chip.flops(kind) / multiprocessors, intensity * L2_SHARE * chip.l2 / readers)
    tile = 2 * a * b * config[name] * ceil(length / config[name]) / rate
    waves, rest = divmod(programs, multiprocessors * config.resident)
    last = ceil(rest / multiprocessors) * tile + WAVE if rest else 0.0
    return waves * (config.resident * tile + WAVE) + last


def kind_of(x: Tensor, weight_dtype: torch.dtype | None, allow_tf32: bool) -> str:
    """Which of a chip's lists fits; `weight_dtype` None where a kernel reads no weight."""
    if x.dtype == torch.float32:
        return "tf32" if allow_tf32 else "ieee"
    return "half" if weight_dtype in (None, x.dtype) else "master"


def choose(
    table: Table, device: torch.device, kind: str, fits: bool, outer: dict[str, list[int]], inner: tuple[str, int], *,
    pieces: int = 1, segments: int = 1, usable: Callable[[Config], bool] = lambda config: True,
) -> Config:  # fmt: skip
    """The config of the least predicted time (`seconds`); of equals the first, the largest tile.

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


# ---- measured

_FORMAT = 2  # of the file; one of another format is ignored


def cache_file() -> Path:
    """Where measured block sizes are kept: fastmask/tuned.json in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastmask" / "tuned.json"


def problem(
    kernel: str, x: Tensor, weight_dtype: torch.dtype | None, widths: Sequence[int], sizes: Sequence[int], plan: Plan,
    allow_tf32: bool,
) -> str:  # fmt: skip
    """The name under which a launch is remembered: the same for about as many tokens and languages.

    Packed widths, those of a batch's largest language, need only be about the same, and multiples of 16 or not.
    """
    chip = torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"
    tokens, languages = (size.bit_length() for size in (plan.n_rows, plan.present.shape[0]))
    dtypes = f"{x.dtype}/{weight_dtype}/{'tf32' if allow_tf32 else 'exact'}".replace("torch.", "")
    steps = [max(1, 1 << width.bit_length() >> 2) for width in widths]
    near = [(width + step // 2) // step * step for width, step in zip(widths, steps, strict=True)]
    sides = "x".join(map(str, [*near, *sizes])) + (" odd" if any(width % 16 for width in widths) else "")
    return f"{chip}/{kernel}/{dtypes}/{sides}/2^{tokens} tokens/2^{languages} languages"


def tuned(
    kernel: str, x: Tensor, weight_dtype: torch.dtype | None, widths: Sequence[int], sizes: Sequence[int], plan: Plan,
    allow_tf32: bool,
) -> Config | None:  # fmt: skip
    """What was measured best for a launch, or None. Costs nothing while nothing has been measured."""
    found = _remembered()
    return found.get(problem(kernel, x, weight_dtype, widths, sizes, plan, allow_tf32)) if found else None


def remember(name: str, config: Config) -> None:
    """Keep a config for a problem, on disk and for this process."""
    path = cache_file()
    _remembered.cache_clear()  # another process may have written since
    found = {**_remembered(), name: config}
    rows = {key: [dict(c.blocks), c.num_warps, c.num_stages] for key, c in sorted(found.items())}
    target = Path(os.path.realpath(path))  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another process never reads half a file.
    file = tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8")  # noqa: SIM115
    try:
        with file:
            json.dump({"format": _FORMAT, "configs": rows}, file, indent=1)
        os.replace(file.name, target)
    finally:
        Path(file.name).unlink(missing_ok=True)
    _remembered.cache_clear()
    forget()


@cache
def _remembered() -> dict[str, Config]:
    """What the file holds; nothing if there is none or it cannot be read, as with any cache."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
        found = stored["configs"] if stored["format"] == _FORMAT else {}
        return {key: Config(tuple(blocks.items()), warps, stages) for key, (blocks, warps, stages) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
