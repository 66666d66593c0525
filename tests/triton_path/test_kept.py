"""What is made of masks and ids is right on every stream and inside of CUDA graphs.

Streams and captures are stood in for by numbers and flags: what counts is who may see what was made where.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fastmask_kernels import plan as plan_module
from fastmask_kernels.interpreter import interpreter_problem, interpreting
from torch import Tensor

import fastmask as fm
from fastmask import kept, operators
from fastmask.kept import Kept, never_written
from fastmask.masks import UNPACKED
from fastmask.models.routing import Route
from fastmask.operators import run
from fastmask.torch_path.layers import Layers
from fastmask.triton_path import tables

CPU = torch.device("cpu")
on_a_cpu = pytest.mark.skipif(
    not interpreting() or interpreter_problem() is not None,
    reason=str(interpreter_problem() or "the interpreter is off on a GPU"),
)


class Device:
    """Which stream is current, and whether it is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 1, False
        monkeypatch.setattr(kept, "stream_of", lambda device: self.stream)
        monkeypatch.setattr(kept, "is_capturing", lambda device: self.capturing)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device on which the test says what goes on."""
    return Device(monkeypatch)


def test_each_stream_makes_its_own(device: Device) -> None:
    """Each stream makes its own, as another one's may not be written yet."""
    made: Kept[list[int]] = Kept()
    tensor = torch.ones(1)
    first = made.of(tensor, lambda: [1])
    assert made.of(tensor, lambda: [2]) is first
    device.stream = 2
    second = made.of(tensor, lambda: [2])
    assert second == [2]
    assert made.of(tensor, lambda: [3]) is second
    device.stream = 1
    assert made.of(tensor, lambda: [3]) is first
    assert made.of(torch.ones(1), lambda: [4]) == [4]


def test_what_a_capture_makes_is_not_kept(device: Device) -> None:
    """What is made in a graph's capture is used only inside the graph, as its memory is empty before a replay."""
    made: Kept[list[int]] = Kept()
    tensor, of_others = never_written(torch.ones(1)), torch.ones(1)
    device.capturing = True
    assert made.of(tensor, lambda: [1]) == [1]
    device.capturing = False
    eager, theirs = made.of(tensor, lambda: [2]), made.of(of_others, lambda: [2])
    assert eager == theirs == [2]
    device.capturing, device.stream = True, 7
    assert made.of(tensor, lambda: [3]) is eager, "what was ready before the capture is used in it"
    assert made.of(of_others, lambda: [3]) == [3], "a replay reads what lies in the tensor then"


def test_what_was_written_is_made_again() -> None:
    """After ids are written in place, what was made of them is made again."""
    made: Kept[int] = Kept()
    tensor = torch.zeros(1)
    assert [made.of(tensor, lambda: 1), made.of(tensor, lambda: 2)] == [1, 1]
    tensor.fill_(1)
    assert made.of(tensor, lambda: 3) == 3
    with torch.inference_mode():
        tensor = torch.zeros(1)
        assert [made.of(tensor, lambda: 1), made.of(tensor, lambda: 2)] == [1, 2]


def test_each_key_and_each_user_has_its_own() -> None:
    """Each key and each user has tables of its own."""
    first: Kept[int] = Kept()
    second: Kept[int] = Kept()
    for tensor in (torch.ones(1), never_written(torch.ones(1))):
        assert [first.of(tensor, lambda: 1), second.of(tensor, lambda: 2)] == [1, 2]
        assert [first.of(tensor, lambda: 3, key) for key in (None, 4, 5)] == [1, 3, 3]


def test_tensors_of_others_stay_as_they_are() -> None:
    """Ids that a user saves or copies carry nothing of what was made of them."""
    made: Kept[int] = Kept()
    tensor = torch.ones(1)
    made.of(tensor, lambda: 1)
    assert not vars(tensor)


def test_nothing_outlives_its_tensor(device: Device) -> None:
    """What was made of a tensor goes with it."""
    made: Kept[Tensor] = Kept()
    for prepared in (lambda tensor: tensor, never_written):
        tensor = prepared(torch.ones(1))
        watched = weakref.ref(made.of(tensor, lambda: torch.zeros(1)))
        assert watched() is not None
        del tensor
        gc.collect()
        assert watched() is None


@pytest.mark.parametrize("kind", ["rows", "blocks", "weights"])
def test_tables_and_layouts_of_a_capture(kind: str, device: Device) -> None:
    """A mask that is first used inside a capture leaves no unwritten table behind."""
    mask = {
        "rows": lambda: fm.Mask.rows(torch.rand(2, 32) < 0.5, 16),
        "blocks": lambda: fm.Mask.blocks(torch.rand(2, 2, 2) < 0.5, (16, 16)),
        "weights": lambda: fm.Mask.weights(torch.rand(2, 32, 32) < 0.5),
    }[kind]()

    def made() -> object:
        return tables.positions_of(mask) if kind == "rows" else tables.layout_of(mask)

    device.capturing = True
    captured = made()
    device.capturing = False
    eager = made()
    assert eager is not captured
    assert made() is eager


# ---- ids on the way to the device


@pytest.mark.parametrize("capturing", [False, True])
def test_ids_in_pinned_memory_may_be_overwritten_at_once(
    capturing: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device, which may be far behind, copies the ids that were given; a graph's replay those that are there."""
    ids, copied = torch.tensor([0, 1]), []
    device.capturing = capturing
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **options: copied.append((tensor, options)))
    kept.sent(ids, torch.device("cuda:0"))
    ((tensor, options),) = copied
    assert options == {"non_blocking": True}
    assert (tensor is ids) == capturing
    ids.fill_(2)
    assert tensor.tolist() == ([2, 2] if capturing else [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_behind() -> None:
    """Ids that are overwritten while the GPU is still busy arrive as they were."""
    ids = torch.tensor([0, 1]).pin_memory()
    torch.cuda._sleep(10**8)
    there = kept.sent(ids, torch.device("cuda"))
    ids.fill_(2)
    assert there.tolist() == [0, 1]


# ---- plans


def plan_of(ids: Tensor) -> plan_module.Plan:
    return tables.plan_of(ids, 4, 3, CPU)


@on_a_cpu
def test_plans_are_made_for_each_stream(device: Device) -> None:
    """A layer on another stream makes a plan of its own."""
    ids = torch.tensor([0, 1])
    first = plan_of(ids)
    device.stream = 2
    second = plan_of(ids)
    assert second is not first
    assert plan_of(ids) is second


@on_a_cpu
def test_plans_of_a_capture_follow_the_ids(device: Device) -> None:
    """A replay computes with the languages of its own batch."""
    ids = torch.tensor([0, 1])
    eager = plan_of(ids)
    device.capturing = True
    captured = plan_of(ids)
    assert captured is not eager
    assert plan_of(ids) is not captured
    device.capturing = False
    assert plan_of(ids) is eager
    # A model's ids are made inside of the capture, for one pass: its layers share a plan.
    device.capturing = True
    own = Route(torch.tensor([0, 1]), (0, 1)).ids_for(torch.ones(2, 1))
    assert plan_of(own) is plan_of(own)


@on_a_cpu
def test_tiles_that_a_capture_makes_of_an_older_plan(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch behind a capture does not take the capture's list of tiles, which nobody has written yet."""
    monkeypatch.setattr(plan_module, "_capturing", lambda _: device.capturing)
    ids = Route(torch.tensor([0, 1]), (0, 1)).ids_for(torch.ones(2, 1))
    eager, before = plan_of(ids), plan_of(ids).tiles(2)
    device.capturing = True
    assert plan_of(ids) is eager
    assert eager.tiles(2) is before
    captured = eager.tiles(4)
    device.capturing = False
    assert eager.tiles(4) is not captured
    assert eager.tiles(4) is eager.tiles(4)
    device.capturing = True
    own = plan_of(Route(torch.tensor([0, 1]), (0, 1)).ids_for(torch.ones(2, 1)))
    assert own.tiles(4) is own.tiles(4)


@on_a_cpu
@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("of_one_pass", [False, True])
def test_a_backward_pass_on_another_stream(
    kind: str, of_one_pass: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward pass on another stream makes tables of its own; the plan is that of its forward pass.

    PyTorch runs a backward pass on the stream of its forward pass, where what is handed over was made.
    """
    monkeypatch.setattr(operators, "FORCED", "triton")
    keep, make = torch.rand(3, 32) < 0.5, (fm.Mask.rows if kind == "rows" else fm.Mask.columns)
    mask, ids = make(keep, 32), torch.tensor([0, 2])
    if of_one_pass:
        ids = Route(ids, None).ids_for(torch.ones(2, 1))
    plan, table, made = tables.Plan, tables.positions, []
    monkeypatch.setattr(tables, "Plan", lambda *arguments: made.append(("plan", device.stream)) or plan(*arguments))
    monkeypatch.setattr(tables, "positions", lambda *given: made.append(("table", device.stream)) or table(*given))
    x, weight = torch.randn(2, 3, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    y, again = (run(Layers([mask], [UNPACKED]), x, [weight], [], ids)[0] for _ in range(2))
    expected = torch.autograd.grad(again.sum(), [x, weight])
    one = set(made)
    device.stream = 2
    results = torch.autograd.grad(y.sum(), [x, weight])
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))
    assert one == {("plan", 1), ("table", 1)}
    # The table spreads y of rows, and dx of columns.
    assert set(made) - one == (set() if kind == "rows" else {("table", 2)})
    assert len(made) == len(set(made))
