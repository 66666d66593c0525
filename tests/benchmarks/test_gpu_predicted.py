"""Predictions on paper: they count what is launched, and no product is faster than its arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fastmask_kernels.chips import CHIPS

from benchmarks.cases.op import PARTS
from benchmarks.gpu.predicted import DENSE, KERNELS, SAME, dense_products, linears_of, masked_products, predicted_ms
from benchmarks.gpu.sections import BITS, BLOCKS_LEFT, GRAPH, HOST, LAYERS, UNITS
from tests.benchmarks.test_gpu_recorded import MOST, run

JOBS = (LAYERS, *UNITS.values(), *BLOCKS_LEFT.values(), *BITS.values())

# Kernels of a BERT layer on the recorder: of the dense one those that the masked one has not, of the masked one its own
# and those that both have.
RECORDED = """
import json
from benchmarks.gpu.recorded import encoder_pass, record
from benchmarks.gpu.recorded import origin
from benchmarks.gpu.sections import LAYERS

def kernels(masked):
    events = record(encoder_pass(LAYERS.setting, masked)).events
    return [sum(origin(event) == where for event in events) for where in ("masked", "other")]

masked, others = kernels(True)
others -= 1  # the batch's ids, which come to the device
print(json.dumps([kernels(False)[1] - others, masked]))
"""


def test_they_count_the_kernels_that_are_launched() -> None:
    """A prediction stands for code that launches more, or less."""
    done = run("-c", RECORDED)
    assert done.returncode == 0, done.stderr
    assert tuple(json.loads(done.stdout)) == KERNELS["encoder", "both"]
    for (case, unit), (_, ours) in KERNELS.items():
        launches, operations = MOST.get(f"{unit}, packed", MOST.get(unit, ((0, 0),)))[0]
        assert ours == launches + operations or case == "encoder"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.setting.words())
def test_no_product_is_faster_than_its_arithmetic(job) -> None:  # type: ignore[no-untyped-def]
    """A product is left out, or is faster on paper than the chip could be."""
    setting = job.setting
    for layer in linears_of(setting):
        flops = 2.0 * setting.batch * setting.tokens * layer.weights * layer.N * layer.K
        dense, ours = dense_products(layer, setting), masked_products(layer, setting)
        assert dense.keys() == ours.keys() == set(PARTS[:3])
        for part, seconds in ours.items():
            live = 1 if layer.kind == "weights" else setting.density
            assert seconds > live * flops / CHIPS["sm_90"].flops_16bit
            assert dense[part] > flops / DENSE


def test_a_pass_is_more_than_its_products() -> None:
    """Traffic, launches or layers are left out of a prediction, or it is made for what the model does not know."""
    setting, both = UNITS["neurons"].setting, PARTS[-1]
    for name in ("dense", "fastmask"):
        apart = sum(predicted_ms(setting, part, name) for part in PARTS[:3])  # type: ignore[misc]
        assert apart < predicted_ms(setting, both, name) < 1.05 * apart  # type: ignore[operator]
        one, four = (predicted_ms(replace(LAYERS.setting, layers=n), GRAPH, name) for n in (1, 4))
        assert four == pytest.approx(4 * one)  # type: ignore[operator]
        device, host, called = (predicted_ms(LAYERS.setting, part, name) for part in (GRAPH, HOST, both))
        assert called == max(device, host)  # type: ignore[type-var]
    assert predicted_ms(LAYERS.setting, HOST, "dense") == pytest.approx(4 * 6e-3 * (29 + SAME))
    assert predicted_ms(setting, both, "packed") is None
    assert predicted_ms(replace(setting, dtype="float32"), both, "dense") is None
    assert predicted_ms(replace(LAYERS.setting, unit="neurons"), both, "dense") is None
