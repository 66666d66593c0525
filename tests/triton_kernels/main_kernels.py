"""The kernels of the layers that people have, for a compile report in a fifth of the time that the whole one takes.

Row kernels in every block size that is shipped and every precision, and what masks over blocks and weights launch.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from fastmask_kernels.recorder import DEVICE, Recorder, Variant

from benchmarks.gpu.recorded import forced, sections
from benchmarks.gpu.setup import REAL
from benchmarks.gpu.shipped import EVEN, launch_shipped


def variants(chip: str) -> list[Variant]:
    """Of `launch_shipped` and of what is timed, where two languages do: their number decides over no kernel."""
    setup = replace(REAL, device=torch.device(DEVICE), languages=2)
    found: dict[tuple[object, ...], Variant] = {}
    with forced():
        for step in itertools.chain([lambda _: launch_shipped(chip, [EVEN], EVEN)], sections(setup)):
            with Recorder(chip) as recorder:
                step(recorder)
            for launch in recorder.launches:
                found.setdefault(launch.variant.key, launch.variant)
    return list(found.values())
