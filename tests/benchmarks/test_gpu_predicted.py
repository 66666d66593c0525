"""Predictions on paper: they count what is launched, and say so where they fall short."""

from __future__ import annotations

import json

import pytest
from fastmask_kernels.limits import CHIPS

from benchmarks.gpu.predicted import BERT, DENSE, HEADS, ROWS, dense_products, masked_products, predicted, table
from tests.benchmarks.test_gpu_recorded import run

WORKLOADS = (BERT, ROWS, HEADS)

# Kernels of the layers of each workload, dense and masked: of a dense BERT layer those that its masked one has not.
RECORDED = """
import json, torch
from dataclasses import replace
import fastmask as fm
from benchmarks.gpu.recorded import encoder_step, layer_step, origin, record
from benchmarks.gpu.setup import REAL
from benchmarks.product import mixed_ids, units_of
from fastmask_kernels.recorder import DEVICE

setup = replace(REAL, device=torch.device(DEVICE))

def kernels(step):
    events = [event for event in record(step).events if event.phase in ("forward", "backward")]
    return [sum(origin(event) == where for event in events) for where in ("masked", "other")]

masked, others = kernels(encoder_step(setup, 1))
found = [[kernels(encoder_step(setup, 1, masked=False))[1] - others, masked]]
for unit in (1, setup.head):
    mask = fm.Mask.rows(units_of(setup.languages, setup.width, unit), setup.width)
    ids = mixed_ids(setup.examples, setup.languages)
    found.append(kernels(layer_step(mask, ids, setup.tokens, setup.dtype, setup.dtype, packed=True))[0])
print(json.dumps(found))
"""


def test_they_count_the_kernels_that_are_launched() -> None:
    """A prediction stands for code that launches more, or less."""
    done = run("-c", RECORDED)
    assert done.returncode == 0, done.stderr
    bert, rows, heads = json.loads(done.stdout)
    assert tuple(bert) == BERT.kernels
    assert (rows, heads) == (ROWS.kernels[1], HEADS.kernels[1])


@pytest.mark.parametrize("load", WORKLOADS, ids=lambda load: load.name)
def test_no_product_is_faster_than_its_arithmetic(load) -> None:  # type: ignore[no-untyped-def]
    """A product is left out, or is faster on paper than the chip could be."""
    for layer in load.layers:
        flops = 2.0 * load.tokens * layer.weights * layer.N * layer.K
        dense, ours = dense_products(layer, load), masked_products(layer, load)
        assert dense.keys() == ours.keys() == {"forward", "dX", "dW"}
        for part, (_, seconds) in ours.items():
            assert seconds > load.density * flops / CHIPS["sm_90"].flops_16bit
            assert dense[part] > flops / DENSE


def test_the_table_says_what_it_is() -> None:
    """A number on paper is taken for a measurement, or one that falls short for one that does not."""
    text = "\n".join(table())
    assert text.count("predicted, on paper") == len(WORKLOADS)
    for load in WORKLOADS:
        ratio, lines = predicted(load)
        assert lines[-1].startswith(f"as called: {ratio:.2f} times dense's speed")
        assert lines[-1].endswith(", short") == (ratio < load.goal)
        for layer in load.layers:
            assert sum(line.startswith(f"{layer.name}: ") for line in lines) == 3
