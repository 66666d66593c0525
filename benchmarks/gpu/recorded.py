"""`python -m benchmarks.gpu.recorded`: what each layer runs on a GPU, counted without one.

`variants` are all kernels that `make gpu` would compile on a chip, its gate and its sections together;
`python -m fastmask_kernels.compile_report` compiles them. The table counts, for layers of the sections, Triton launches
and torch operations of a forward and backward pass, and apart from them those that make the batch's plan. Below
it stands what layers would take by a model on paper (`predicted`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from fastmask_kernels.live_adamw import DTYPES, Job, live_adamw
from fastmask_kernels.recorder import DEVICE, Launch, Operation, Recorder, Variant
from torch import Tensor, nn

import fastmask as fm
from benchmarks.gpu import problems
from benchmarks.gpu.host import host_time
from benchmarks.gpu.predicted import table
from benchmarks.gpu.setup import REAL, Setup
from benchmarks.gpu.shipped import EDGES, EVEN, launch_shipped
from benchmarks.product import mixed_ids, units_of
from benchmarks.variants import encoder_of
from fastmask import operators
from fastmask.live import live_of
from fastmask.masks import UNPACKED
from fastmask.operators import compute, compute_projections
from fastmask.torch_path.activations import NONE

__all__ = ["Count", "counted", "encoder_step", "layer_step", "main", "origin", "record", "variants"]

Step = Callable[[Recorder], object]  # a forward and backward pass that tells the recorder where it is


# ---- one pass


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def layer_step(
    mask: fm.Mask, ids: Tensor, tokens: int, act: torch.dtype, own: torch.dtype, packed: bool = False,
    activation: str = NONE,
) -> Step:  # fmt: skip
    """One masked layer on a batch of `tokens` tokens for each of `ids` [B]; `packed` as in an attached model."""
    B, N, K = len(ids), mask.out_features, mask.in_features
    width = UNPACKED
    if packed:
        width = max(mask.live_counts())
        N, K = (width, K) if mask.kind == "rows" else (N, width)
    on_device = mask.to(DEVICE)
    weight = nn.Parameter(randn(mask.out_features, mask.in_features, dtype=own))
    bias = nn.Parameter(randn(mask.out_features, dtype=own))
    x, dy = randn(B, tokens, K, dtype=act).requires_grad_(), randn(B, tokens, N, dtype=act)

    def step(recorder: Recorder) -> None:
        device_ids = _next_batch(recorder, ids, [weight, bias])
        recorder.phase = "forward"
        y = compute(x, weight, on_device, device_ids, bias, width, activation)
        recorder.phase = "backward"
        torch.autograd.grad(y, [x, weight, bias], dy)

    return step


def projections_step(masks: list[fm.Mask], ids: Tensor, tokens: int, act: torch.dtype, own: torch.dtype) -> Step:
    """Layers that share their input, in one call."""
    widths = [max(mask.live_counts()) for mask in masks]
    on_device = [mask.to(DEVICE) for mask in masks]
    weights = [nn.Parameter(randn(mask.out_features, mask.in_features, dtype=own)) for mask in masks]
    biases = [nn.Parameter(randn(mask.out_features, dtype=own)) for mask in masks]
    x = randn(len(ids), tokens, masks[0].in_features, dtype=act).requires_grad_()

    def step(recorder: Recorder) -> None:
        device_ids = _next_batch(recorder, ids, [*weights, *biases])
        recorder.phase = "forward"
        ys = compute_projections(x, weights, on_device, device_ids, biases, widths)
        recorder.phase = "backward"
        torch.autograd.grad(ys, [x, *weights, *biases], [torch.empty_like(y) for y in ys])

    return step


def model_step(model: nn.Module, batch: dict[str, Tensor], ids: Tensor | None) -> Step:
    """A whole model in training, on `DEVICE`."""
    for layer in model.modules():
        if isinstance(layer, fm.MaskedLinear):
            layer.mask = layer.mask.to(DEVICE)  # masks do not follow weights that have no memory

    def step(recorder: Recorder) -> None:
        model.zero_grad(set_to_none=True)
        arguments = dict(batch)
        if ids is not None:
            arguments["language_ids"] = _next_batch(recorder, ids, list(model.parameters()))
        recorder.phase = "forward"
        y = model(**arguments)[0]
        recorder.phase = "backward"
        y.backward(torch.empty_like(y))

    return step


def _next_batch(recorder: Recorder, ids: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """What comes between two passes: new ids, and parameters that an optimiser has changed."""
    recorder.phase = "update"
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    return ids.to(DEVICE)


def encoder_step(setup: Setup, layers: int, masked: bool = True, dtype: torch.dtype | None = None) -> Step:
    """The encoder of the section `encoder` with so many layers, heads and neurons at 50%, or dense."""
    sizes = (setup.hidden, layers, setup.heads, setup.ffn, setup.encoder_tokens)
    model = encoder_of(*sizes, torch.device("cpu"), dtype or setup.dtype)
    x = randn(setup.encoder_examples, setup.encoder_tokens, setup.hidden, dtype=dtype or setup.dtype)
    ids = mixed_ids(setup.encoder_examples, setup.languages) if masked else None
    if masked:
        names = [f"language {i}" for i in range(setup.languages)]
        fm.attach(model, fm.Subnetworks.random(model.config, names, 0.5, seed=0, units="both"), verify=False)
    return model_step(model.to(DEVICE), {"inputs_embeds": x}, ids)


@contextmanager
def forced() -> Iterator[None]:
    """Masked layers take the Triton path, whatever the device."""
    before, operators.FORCED = operators.FORCED, "triton"
    operators._why_not_here.cache_clear()
    try:
        yield
    finally:
        operators.FORCED = before
        operators._why_not_here.cache_clear()


def record(step: Step, chip: str = "sm_90") -> Recorder:
    """What a pass runs once everything is there that is kept between passes."""
    with forced():
        with Recorder(chip) as recorder:
            step(recorder)
        with Recorder(chip) as recorder:
            step(recorder)
    return recorder


# ---- counts


@dataclass
class Count:
    """Triton launches and torch operations of one forward and backward pass, by where they come from."""

    what: str
    forward: tuple[int, int]
    backward: tuple[int, int]
    plan: tuple[int, int]

    @property
    def masked(self) -> int:
        """Launches and operations of the masked layers, the plan left out."""
        return sum(self.forward) + sum(self.backward)


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


def layers(setup: Setup) -> Iterator[tuple[str, Step]]:
    """The layers of the table, by name."""
    n, L, dtype = setup.width, setup.languages, setup.dtype
    ids = mixed_ids(setup.examples, L)
    yield f"BERT layer {setup.hidden}, heads and neurons", encoder_step(setup, 1)
    for kind in ("rows", "columns"):
        keep = units_of(L, n, 1)
        mask = fm.Mask.rows(keep, n) if kind == "rows" else fm.Mask.columns(keep, n)
        yield f"{kind} {n} x {n}, packed", layer_step(mask, ids, setup.tokens, dtype, dtype, packed=True)
        yield f"{kind} {n} x {n}", layer_step(mask, ids, setup.tokens, dtype, dtype)
    for kind, unit in (("blocks", setup.block), ("weights", 1)):
        mask = _mask(kind, unit, L, n, n)
        yield f"{kind} {n} x {n}", layer_step(mask, ids, setup.tokens, dtype, dtype)


# ---- everything that `make gpu` launches


def gate() -> Iterator[Step]:
    """The passes of the tests: `tests/gpu` on every problem."""
    for (of, name), (dtypes, (act, own)) in itertools.product(problems.cases(), problems.DTYPES.items()):
        (kind, unit), (L, ids, tokens, N, K) = problems.KINDS[of], problems.CASES[name]
        mask = _mask(kind, unit, L, *problems.sides(of, N, K))
        for packed in (False, True) if name in problems.PACKED and kind in ("rows", "columns") else (False,):
            yield _with_tf32(dtypes == "tf32", layer_step(mask, torch.tensor(ids), tokens, act, own, packed))
    for name, (dtypes, (act, own)), activation in itertools.product(
        problems.PACKED, problems.DTYPES.items(), problems.ACTIVATIONS
    ):
        L, ids, tokens, N, K = problems.CASES[name]
        step = layer_step(_mask("columns", 1, L, N, K), torch.tensor(ids), tokens, act, own, True, activation)
        yield _with_tf32(dtypes == "tf32", step)
    case, sizes, K = problems.PROJECTIONS
    L, ids, tokens, _, _ = problems.CASES[case]
    for (unit, rows), (act, own), n in itertools.product(sizes.items(), problems.DTYPES.values(), (2, 3)):
        masks = [_mask("rows", unit, L, size, K) for size in rows[:n]]
        yield projections_step(masks, torch.tensor(ids), tokens, act, own)
    for rows, columns in (([128, 256], EDGES), ([256], EVEN)):
        yield lambda recorder, rows=rows, columns=columns: launch_shipped(recorder.chip, rows, columns)  # type: ignore[misc]
    yield from optimizer_steps()
    for config, dtype in itertools.product(problems.tiny_models().values(), (torch.float32, torch.bfloat16)):
        yield _tiny_model_step(config, dtype)


def optimizer_steps() -> Iterator[Step]:
    """Steps of the optimiser: on weights that live one by one, and on those that a vector instruction moves."""
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    n = 64
    for dtype, kind, lr in itertools.product(DTYPES, ("rows", "columns"), (1e-3, randn(dtype=torch.float32))):
        live = live_of(_mask(kind, 1, 2, n, n), [0])
        tensors = (randn(n, n, dtype=dtype) for _ in range(4))
        job = Job(*tensors, randn(dtype=torch.float32), live.words.to(DEVICE), live.cell)
        yield lambda _, job=job, lr=lr: live_adamw([job], lr=lr, **options)  # type: ignore[misc]


def sections(setup: Setup) -> Iterator[Step]:
    """The passes of the sections `units`, `blocks`, `bits`, `launches` and `encoder`."""
    n, L, dtype = setup.width, setup.languages, setup.dtype
    ids, alone = mixed_ids(setup.examples, L), torch.zeros(setup.examples, dtype=torch.int64)
    for unit in (1, setup.head):
        for kind in ("rows", "columns"):
            keep = units_of(L, n, unit)
            mask = fm.Mask.rows(keep, n) if kind == "rows" else fm.Mask.columns(keep, n)
            yield layer_step(mask, ids, setup.tokens, dtype, dtype, packed=True)
    yield layer_step(_mask("blocks", setup.block, 1, n, n), alone, setup.tokens, dtype, dtype)
    yield layer_step(_mask("weights", 1, 1, n, n), alone, setup.tokens, dtype, dtype)
    yield layer_step(_mask("weights", 1, L, n, n), ids, setup.tokens, dtype, dtype)
    from benchmarks.gpu.small import tiny_masks

    for mask in tiny_masks(L).values():
        yield layer_step(mask, mixed_ids(4, L), 8, dtype, dtype)
    yield encoder_step(setup, 1)


def sweeps(setup: Setup) -> Iterator[Step]:
    """The configs that the section `sweep` tries."""
    from benchmarks.gpu.sweep import workloads

    for work in workloads(setup):
        for config in (None, *work.configs):
            yield lambda _, work=work, config=config: work.run(config)  # type: ignore[misc]


def variants(chip: str) -> list[Variant]:
    """Every kernel that `make gpu` compiles on a chip, once each, in the order of the first launches."""
    setup = replace(REAL, device=torch.device(DEVICE))
    found: dict[tuple[object, ...], Variant] = {}
    with forced():
        for step in itertools.chain(gate(), sections(setup), sweeps(setup) if chip == "sm_90" else ()):
            with Recorder(chip) as recorder:
                step(recorder)
            for launch in recorder.launches:
                found.setdefault(launch.variant.key, launch.variant)
    return list(found.values())


def _mask(kind: str, unit: int, L: int, N: int, K: int) -> fm.Mask:
    def keep(*shape: int) -> Tensor:
        return torch.rand(L, *shape) < 0.5

    if kind == "rows":
        return fm.Mask.rows(keep(N // unit).repeat_interleave(unit, 1), K)
    if kind == "columns":
        return fm.Mask.columns(keep(K // unit).repeat_interleave(unit, 1), N)
    if kind == "blocks":
        return fm.Mask.blocks(keep(-(-N // unit), -(-K // unit)), (unit, unit))
    return fm.Mask.weights(keep(N, K))


def _with_tf32(allowed: bool, step: Step) -> Step:
    def run(recorder: Recorder) -> None:
        switch = torch.backends.cuda.matmul
        before, switch.fp32_precision = switch.fp32_precision, "tf32" if allowed else "ieee"
        try:
            step(recorder)
        finally:
            switch.fp32_precision = before

    return run


def _tiny_model_step(config: object, dtype: torch.dtype) -> Step:
    from transformers import AutoModel

    model = AutoModel.from_config(config).to(dtype)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b", "c"], 0.5, seed=0, units="both"), verify=False)
    tokens = torch.zeros(5, 6, dtype=torch.int64, device=DEVICE)
    ids = torch.tensor([2, 0, 0, -1, 1])  # on the CPU, as in the tests: ids on a device may not ask for everything
    # A whole mask, as transformers looks at positions or at a mask of tokens, which waits for the device.
    inputs = {"input_ids": tokens, "attention_mask": randn(5, 1, 6, 6, dtype=dtype), "language_ids": ids}
    return model_step(model.to(DEVICE), inputs, None)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.recorded", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the counts to this file as well")
    parser.add_argument("--host-time", action="store_true", help="time the host's part of a layer instead; see host.py")
    options = parser.parse_args(arguments)
    setup = replace(REAL, device=torch.device(DEVICE))
    if options.host_time:
        with forced():
            found = host_time()
        print(
            f"host time of a BERT layer, forward + backward: "
            f"{1 / found.median:.2f} times nn.Linear's ({1 / found.high:.2f} to {1 / found.low:.2f}), "
            f"{found.ours_ms:.3f} ms and {found.baseline_ms:.3f} ms, {found.pairs} pairs"
        )
        return 0
    counts = [counted(name, record(step)) for name, step in layers(setup)]
    print(f"{setup.languages} languages; Triton launches + torch operations of one pass")
    print(f"{'':<44}{'forward':>10}{'backward':>10}{'masked':>8}{'plan':>9}")
    for count in counts:
        cells = [f"{launches} + {operations}" for launches, operations in (count.forward, count.backward, count.plan)]
        print(f"{count.what:<44}{cells[0]:>10}{cells[1]:>10}{count.masked:>8}{cells[2]:>9}")
    print("\n" + "\n".join(table()).rstrip())
    if options.json:
        options.json.write_text(json.dumps({count.what: asdict(count) for count in counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
