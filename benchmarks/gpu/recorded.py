"""`python -m benchmarks.gpu.recorded`: what each layer runs on a GPU, counted without one.

The table counts, for layers of the sections, Triton launches and torch operations of a forward and backward pass, and
apart from them those that make the batch's plan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from fastmask_kernels.recorder import Launch, Operation, Recorder

from benchmarks.cases.op import mask_of
from benchmarks.gpu.host import host_time
from benchmarks.gpu.passes import Step, encoder_step, forced, layer_step, record
from benchmarks.gpu.sections import BITS, BLOCKS_LEFT, LAYERS, UNITS

__all__ = ["Count", "counted", "layers", "main", "origin"]


@dataclass
class Count:
    """Triton launches and torch operations of one forward and backward pass, by where they come from."""

    what: str
    forward: tuple[int, int]
    backward: tuple[int, int]
    plan: tuple[int, int]


def origin(event: Launch | Operation) -> str:
    """Who asked for it: "plan" (once for a batch), "masked" (a masked layer), or "other" (the model, the engine)."""
    ours = list(itertools.takewhile(lambda name: name.split(".")[0] in ("fastmask", "fastmask_kernels"), event.callers))
    if not ours:
        return "other"
    return "plan" if any(name.rpartition(".")[2] in ("plan", "tables", "routing") for name in ours) else "masked"


def counted(what: str, recorder: Recorder) -> Count:
    """The counts of what was recorded."""
    found = Counter((origin(event), event.phase, isinstance(event, Launch)) for event in recorder.events)

    def both(where: str, *phases: str) -> tuple[int, int]:
        launches, operations = (sum(found[where, phase, is_launch] for phase in phases) for is_launch in (True, False))
        return launches, operations

    plan = both("plan", "forward", "backward")
    return Count(what, both("masked", "forward"), both("masked", "backward"), plan)


def layers() -> Iterator[tuple[str, Step]]:
    """The layers of the table, by name."""
    yield "BERT layer, heads and neurons", encoder_step(LAYERS.setting)
    dtype = torch.bfloat16
    for job in (*UNITS.values(), BLOCKS_LEFT[0.5], BITS[8]):
        setting = replace(job.setting, present=8)
        masks = [mask_of(setting)]
        for packed in (True, False) if masks[0].kind in ("rows", "columns") else (False,):
            step = layer_step(masks, setting.ids(), setting.tokens, dtype, dtype, packed)
            yield f"{setting.unit}{', packed' if packed else ''}", step


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.recorded", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the counts to this file as well")
    parser.add_argument("--host-time", action="store_true", help="time the host's part of a layer instead; see host.py")
    options = parser.parse_args(arguments)
    if options.host_time:
        with forced():
            print(host_time())
        return 0
    counts = [counted(name, record(step)) for name, step in layers()]
    print("8 languages; Triton launches + torch operations of one pass")
    print(f"{'':<32}{'forward':>10}{'backward':>10}{'masked':>8}{'plan':>9}")
    for count in counts:
        cells = [f"{launches} + {operations}" for launches, operations in (count.forward, count.backward, count.plan)]
        print(f"{count.what:<32}{cells[0]:>10}{cells[1]:>10}{sum(count.forward + count.backward):>8}{cells[2]:>9}")
    if options.json:
        options.json.write_text(json.dumps({count.what: asdict(count) for count in counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
