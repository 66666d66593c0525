"""How long a product takes by a model on paper: waves of programs, each bound by arithmetic or by the L2 cache.

Its numbers are assumptions, not measurements; what it is for is to compare block sizes, and to say in advance what a
measurement is to be held against.
"""

from __future__ import annotations

from math import ceil

from fastmask_kernels.configs import Config
from fastmask_kernels.limits import Chip

__all__ = ["ELEMENT", "L2_SHARE", "WAVE", "programs_of", "seconds"]

L2_SHARE = 0.7  # of the theoretical rate of the L2 cache: what others measured of an H100 is 5.5 to 7 of 9 TB/s
WAVE = 3e-6  # seconds in which a wave's programs wait for their first tiles (four reads, each by the last) or write
ELEMENT = {"half": 2, "master": 3, "tf32": 4, "ieee": 4}  # bytes, on average over both operands
_FLOPS = {"half": "bf16", "master": "bf16", "tf32": "tf32", "ieee": "fp32"}


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
    rate = min(chip.flops(_FLOPS[kind]) / multiprocessors, intensity * L2_SHARE * chip.l2 / readers)
    tile = 2 * a * b * config[name] * ceil(length / config[name]) / rate
    waves, rest = divmod(programs, multiprocessors * config.resident)
    last = ceil(rest / multiprocessors) * tile + WAVE if rest else 0.0
    return waves * (config.resident * tile + WAVE) + last
