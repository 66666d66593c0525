"""The kernels of the layers that people have, for a compile report in a fifth of the time that the whole one takes.

Row kernels in every block size that is shipped and every precision, and what masks over blocks and weights launch.
"""

from __future__ import annotations

import itertools

from fastmask_kernels.recorder import Variant

from benchmarks.gpu.recorded import EVEN, launch_shipped, sections, variants_of


def variants(chip: str) -> list[Variant]:
    """Of `launch_shipped` and of what is timed, where two languages do: their number decides over no kernel."""
    return variants_of(chip, itertools.chain([lambda: launch_shipped([EVEN], EVEN)], sections(2)))
