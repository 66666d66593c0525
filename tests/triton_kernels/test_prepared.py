"""A launch that goes past Triton's binder hands the driver what the binder would have handed it.

The driver is the recorder's stub, in a process of its own; tensors lie on the CPU, and have addresses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastmask_kernels import configs, launching
from fastmask_kernels.configs import Config
from fastmask_kernels.launching import Prepared
from recorded_code import recorded

# The one that takes turns and has shared memory to spare; and, with -m slow, the others.
CHIPS = ["sm_90", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("sm_80", "sm_100", "gfx942"))]


def prepared(code: str) -> Any:
    return recorded(f"from prepared_launches import *\n{code}")


@pytest.mark.parametrize("chip", CHIPS)
def test_the_driver_gets_the_same(chip: str) -> None:
    """A prepared launch hands the driver the variant, grid and arguments that the binder would."""
    seen, kept, after = prepared(f"""
with Driver({chip!r}) as driver:
    seen = {{}}
    for name, call in calls().items():
        driver.given.clear()
        for _ in range(3):
            call()
        seen[name] = driver.given[:]
    kept = len(launching._found)
print(json.dumps([seen, kept, len(launching._found)]))
""")
    assert len(seen) == kept == 39
    assert after == 0, "variants of a stub stay behind"
    for name, given in seen.items():
        assert len(given) % 3 == 0
        bound, *others = (given[i : i + len(given) // 3] for i in range(0, len(given), len(given) // 3))
        for direct in others:
            assert direct == bound, name


def test_addresses_that_are_no_multiple_of_16() -> None:
    """Addresses that are no multiple of 16 get the variant that copies element by element."""
    keys = prepared("""
memory = torch.zeros(80, dtype=torch.bfloat16)
run = Prepared(scale, (3,), (0, 1), 48, 7, 1, FLAG=True, BLOCK=64, num_warps=4)
with Driver() as driver:
    for first in (1, 1, 0, 0, 2, 0, 8):
        run(memory[first : first + 64], memory)
print(json.dumps([key for key, _, _ in driver.given]))
""")
    odd, odd_again, whole, straight, other, back, eight = keys
    assert odd == odd_again == other != whole
    assert whole == straight == back == eight


def test_unaligned_activations_get_their_own_block_sizes() -> None:
    """Unaligned rows do not get the block sizes kept for aligned ones of the same shape."""
    found = prepared("""
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
memory = torch.zeros(512 * 64 + 8, dtype=torch.bfloat16)
weight, index, counts = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(1, 64).long(), torch.zeros(1).long()
with Driver() as driver:
    plan = Plan(torch.tensor([0, 0]), 256, 1)
    for first in (0, 0, 1, 1, 8, 0):
        row_matmul(memory[first:][: 512 * 64].view(512, 64), [weight], [index], [counts], plan, [64])
print(json.dumps([key for key, _, _ in driver.given]))
""")
    assert found[0] == found[1] == found[4] == found[5]
    assert found[2] == found[3] != found[0]


def test_block_sizes_are_chosen_once_for_a_shape() -> None:
    """Block sizes are chosen once for a shape, not at every launch."""
    found = prepared("""
from fastmask_kernels import row_matmul, row_matmul_t, row_arguments
chosen = []
for module in (row_matmul, row_matmul_t, row_arguments):
    def counting(*given, choose=module.choose, **options):
        chosen.append(1)
        return choose(*given, **options)
    module.choose = counting
with Driver() as driver:
    counts, every = [], calls()
    for _ in range(3):
        for call in every.values():
            call()
        counts.append(len(chosen))
print(json.dumps([counts, len(every)]))
""")
    (first, *later), calls = found
    assert first == calls
    assert later == [first] * 2


def test_a_profiler_sees_every_launch() -> None:
    """Prepared launches are in a profile, too."""
    found = prepared("""
import triton
memory, runtime = torch.zeros(64), triton.knobs.runtime
run = Prepared(scale, (3,), (0, 0), 48, 7, 1, FLAG=True, BLOCK=64)
with Driver() as driver:
    for _ in range(2):
        run(memory)
    runtime.launch_enter_hook.add(print)
    run(memory)
    runtime.launch_enter_hook.remove(print)
    run(memory)
print(json.dumps([driver.hooks, driver.given[0] == driver.given[1] == driver.given[2] == driver.given[3]]))
""")
    assert found == [[True, False, True, False], True]


def test_wrong_use_is_named_after_right_use() -> None:
    """What was checked once for one call is checked again for another."""
    found = prepared("""
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
with Driver() as driver:
    plan = Plan(torch.tensor([0, 0]), 4, 1)
    x, index, counts = torch.zeros(8, 64), torch.zeros(1, 64).long(), torch.zeros(1).long()
    right = {"x": x, "weights": [torch.zeros(64, 64)], "indices": [index], "counts": [counts], "widths": [64]}
    right["plan"] = plan
    wrong = [
        {"x": x.double()}, {"x": x[:7]}, {"x": x[:, :63]}, {"weights": [torch.zeros(64, 64).half()]}, {"widths": [0]},
        {"weights": [torch.zeros(64, 64).t()[:, :]]}, {"weights": [torch.zeros(64, 128)[:, ::2]]},
        {"indices": [index.int()]}, {"counts": [counts[:0]]}, {"plan": Plan(torch.tensor([0]), 4, 1)},
        {"biases": [torch.zeros(63)]}, {"outs": [torch.zeros(8, 63)]}, {"activation": "gelu"}, {"before": x},
    ]
    errors = []
    for change in wrong:
        for _ in range(2):
            row_matmul(**right)
        before = len(driver.given)
        try:
            row_matmul(**(right | change))
        except (TypeError, ValueError) as error:
            errors.append(len(driver.given) - before)
print(json.dumps([len(wrong), errors]))
""")
    assert found == [14, [0] * 14]


def test_measured_block_sizes_are_used_at_once(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Block sizes that have just been measured are used from the next launch on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launching._found["a launch"] = 1
    try:
        configs.remember("a problem", Config((("BM", 16),), 4, 2))
        assert not launching._found
    finally:
        launching.forget()
        configs._remembered.cache_clear()


def test_shapes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many numbers of tokens there are, only so many launches are kept."""
    monkeypatch.setattr(launching, "_MOST", 3)
    monkeypatch.setattr(launching, "_found", {})
    monkeypatch.setattr(launching.triton.knobs.runtime, "interpret", False)
    for n in range(20):
        assert launching.prepared(n, lambda n=n: [n]) is launching.prepared(n, lambda: None)
        assert len(launching._found) <= 3


class Kernel:
    """Says which device is current when it, or what it was compiled to, is launched."""

    arg_names = ("x", "y", "n", "SIZE")
    function = packed_metadata = None

    def __init__(self, current: list[int]) -> None:
        self.current, self.launches = current, []

    def __getitem__(self, grid):  # type: ignore[no-untyped-def]
        def bound(*arguments, **options):  # type: ignore[no-untyped-def]
            self.launches.append(("bound", grid, arguments, options, self.current[0]))
            return self

        return bound

    def run(self, x, y, z, stream, *more):  # type: ignore[no-untyped-def]
        self.launches.append(("direct", (x, y, z), stream, more[5:], self.current[0]))


def test_the_tensors_device_and_its_stream(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared launch goes to the device of its tensors, and to its current stream."""
    driver = SimpleNamespace(get_current_device=lambda: current[0], get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(launching.drivers, "_active", driver)
    kernel = Kernel(current)
    tensor = SimpleNamespace(is_cuda=True, get_device=lambda: 1, data_ptr=lambda: 32)
    run = Prepared(kernel, (2,), (0, 0), 5, SIZE=3, num_warps=4)
    run(tensor)
    run(tensor)
    current[0] = 1
    run(tensor)
    assert kernel.launches[0] == ("bound", (2,), (tensor, tensor, 5), {"SIZE": 3, "num_warps": 4}, 1)
    assert kernel.launches[1:] == [("direct", (2, 1, 1), 71, (32, 32, 5, 3), 1)] * 2
