"""The recorder sees what would run on a GPU: every launch, in the variant that would be compiled, and torch's kernels.

It needs Triton's own launch path, which these tests' process may have replaced by the interpreter: it runs in its own.
"""

from __future__ import annotations

import pytest
from recorded_code import recorded


def test_launches_are_the_variants_that_triton_would_compile() -> None:
    """Types, hints, flags, warps and grids are those with which a GPU would run."""
    found = recorded("""
x = torch.empty(64, 48, dtype=torch.bfloat16, device="meta")
with Recorder("sm_80") as recorder:
    scale[(3, 2)](x, None, 48, 7, 1, FLAG=True, BLOCK=64, num_warps=8, num_stages=2)
    scale[(5,)](x[:, 1:], x, 48, 7, 1, FLAG=False, BLOCK=64)
    scale[(6,)](x, None, 32, 7, 1, FLAG=True, BLOCK=64, num_warps=8, num_stages=2)
print(json.dumps({
    "launches": [
        [l.name, l.grid, l.variant.constexprs, l.variant.num_warps, l.variant.num_stages, l.variant.chip]
        for l in recorder.launches
    ],
    "signatures": [l.variant.source.signature for l in recorder.launches],
    "unhinted": [l.variant.unhinted for l in recorder.launches],
    "hinted": [(0,) in l.variant.source.attrs and bool(l.variant.source.attrs[(0,)]) for l in recorder.launches],
    "keys": len({l.variant.key for l in recorder.launches}),
}))
""")
    assert found["launches"] == [
        ["scale", [3, 2, 1], {"FLAG": True, "BLOCK": 64}, 8, 2, "sm_80"],
        ["scale", [5, 1, 1], {"FLAG": False, "BLOCK": 64}, 4, 3, "sm_80"],
        ["scale", [6, 1, 1], {"FLAG": True, "BLOCK": 64}, 8, 2, "sm_80"],
    ]
    first, second, _ = found["signatures"]
    # None and 1 are constants; 7 is a number that is no multiple of 16.
    assert first["x"] == "*bf16"
    assert first["y"] == first["one"] == "constexpr"
    assert second["y"] == "*bf16"
    assert found["unhinted"] == [["odd"]] * 3
    assert found["hinted"] == [True, False, True]  # two bytes past a multiple of 16
    assert found["keys"] == 2  # 48 and 32 are both multiples of 16


def test_operations_are_those_with_a_kernel() -> None:
    """Fills, casts and copies are counted; views are not."""
    found = recorded("""
x = torch.empty(4, 6, device="meta")
ids = torch.tensor([1, 2])
def names(function):
    with Recorder() as recorder:
        function()
    return [operation.name for operation in recorder.operations]
print(json.dumps([
    names(lambda: (x.view(24), x.t(), x[1:], x.expand(2, 4, 6), x.detach(), x.contiguous(), x.to(x.dtype), x.shape)),
    names(lambda: (torch.empty_like(x), x.new_empty(3), torch.empty(0, device="meta").zero_())),
    names(lambda: (ids + 1, ids.tolist())),
    names(lambda: (torch.zeros(3, device="meta"), x.zero_(), x.half(), x.t().contiguous(), x.clone(), x.copy_(x))),
    names(lambda: (x[:, ids.to("meta")], ids.to("meta"), x.sum(0), torch._assert_async(x.any(), "message"))),
]))
""")
    views, empty, on_the_cpu, filled, others = found
    assert views == empty == on_the_cpu == []
    assert [name.split(".")[0] for name in filled] == ["zeros", "zero_", "_to_copy", "clone", "clone", "copy_"]
    assert [name.split(".")[0] for name in others] == [
        "_to_copy", "index", "_to_copy", "sum", "any", "_assert_async",
    ]  # fmt: skip


def test_phases_and_callers() -> None:
    """Each launch is known to belong to the forward or the backward pass, and by whom it was made."""
    found = recorded("""
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x
    @staticmethod
    def backward(ctx, dy):
        launch(dy)
        return dy
x = torch.empty(4, 6, device="meta", requires_grad=True)
with Recorder() as recorder:
    y = Doubled.apply(x.exp())
    y.backward(torch.empty_like(y))
    launch(x)
print(json.dumps([[event.name, event.phase, event.callers] for event in recorder.events]))
""")
    assert found == [
        ["exp.default", "forward", ["__main__"]],
        ["add.Tensor", "forward", ["__main__"]],
        ["scale", "backward", ["recorder_kernels", "__main__"]],
        ["mul.Tensor", "backward", ["__main__"]],
        ["scale", "forward", ["recorder_kernels", "__main__"]],
    ]


def test_waiting_for_the_device_raises() -> None:
    """A pass that makes the host wait for the device raises an error."""
    found = recorded("""
x = torch.empty(4, device="meta")
def error(function):
    try:
        with Recorder():
            function()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
print(json.dumps([error(lambda: x.sum().item()), error(lambda: x.nonzero()), error(lambda: x + 1)]))
""")
    assert found[0]
    assert found[1]
    assert found[2] is None


def test_nothing_is_left_behind() -> None:
    """After a recording, launches go to the GPU again."""
    found = recorded("""
from triton.runtime import driver
from fastmask_kernels import chips, interpreter
def state():
    return [id(driver._active), id(triton.compiler.compile), chips.stand_in, interpreter.recorded_device]
before, x = state(), torch.empty(16, device="meta")
try:
    with Recorder("sm_100"):
        inside = state()
        launch(x)
        raise KeyError
except KeyError:
    pass
compiler = scale.compile is triton.compiler.compile
print(json.dumps([before == state(), inside == before, len(scale.device_caches), compiler]))
""")
    assert found == [True, False, 0, True]


def test_the_interpreter_is_refused() -> None:
    """The recorder refuses to work under the interpreter, where nothing is launched."""
    with pytest.raises(AssertionError, match="TRITON_INTERPRET"):
        recorded("triton.knobs.runtime.interpret = True\nRecorder()")
