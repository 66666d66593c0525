"""Everything that `make gpu` launches, its gate and its sections together, on the recorder's device.

`variants` are all kernels that it would compile on a chip; `python -m fastmask_kernels.compile_report` compiles them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from fastmask_kernels.live_adamw import DTYPES, Job, live_adamw
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import DEVICE, Recorder, Variant
from fastmask_kernels.row_configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from torch import Tensor

import fastmask as fm
from benchmarks.cases.op import mask_of
from benchmarks.gpu import problems
from benchmarks.gpu.passes import Step, encoder_step, forced, layer_step, model_step, randn
from benchmarks.gpu.sections import SECTIONS
from fastmask.live import live_of

__all__ = ["EVEN", "gate", "launch_shipped", "sections", "variants", "variants_of"]

EVEN, EDGES = 256, 48  # columns that every block of the row kernels divides, or none
_BF16, _FP32 = torch.bfloat16, torch.float32
_KINDS = {"half": (_BF16, _BF16), "master": (_BF16, _FP32), "tf32": (_FP32, _FP32), "ieee": (_FP32, _FP32)}


def variants(chip: str) -> list[Variant]:
    """Every kernel that `make gpu` compiles on a chip."""
    return variants_of(chip, itertools.chain(gate(), sections()))


def variants_of(chip: str, steps: Iterable[Step]) -> list[Variant]:
    """What is launched, once each, in the order of the first launches."""
    found: dict[tuple[object, ...], Variant] = {}
    with forced():
        for step in steps:
            with Recorder(chip) as recorder:
                step(recorder)
            for launch in recorder.launches:
                found.setdefault(launch.variant.key, launch.variant)
    return list(found.values())


def sections(languages: int | None = None) -> Iterator[Step]:
    """The passes of what is timed, each setting once; on request with so many languages. Densities change no launch."""
    settings = [replace(job.setting, density=0.5) for jobs in SECTIONS.values() for job in jobs]
    for setting in dict.fromkeys(setting for setting in settings if not setting.compiled):
        if languages is not None:
            setting = replace(setting, languages=languages, present=min(setting.present, languages))
        if setting.case == "encoder":
            yield encoder_step(setting)
        else:
            yield layer_step([mask_of(setting)], setting.ids(), setting.tokens, _BF16, _BF16)


# ---- the gate


def gate() -> Iterator[Step]:
    """The passes of the tests: `tests/gpu` on every problem."""
    for (of, name), (dtypes, (act, own)) in itertools.product(problems.cases(), problems.DTYPES.items()):
        (kind, unit), (L, ids, tokens, N, K) = problems.KINDS[of], problems.CASES[name]
        masks = [_mask(kind, unit, L, *problems.sides(of, N, K))]
        for packed in (False, True) if name in problems.PACKED else (False,):
            yield _with_tf32(dtypes == "tf32", layer_step(masks, torch.tensor(ids), tokens, act, own, packed))
    for name, (dtypes, (act, own)), activation in itertools.product(
        problems.PACKED, problems.DTYPES.items(), problems.ACTIVATIONS
    ):
        L, ids, tokens, N, K = problems.CASES[name]
        step = layer_step([_mask("columns", 1, L, N, K)], torch.tensor(ids), tokens, act, own, True, activation)
        yield _with_tf32(dtypes == "tf32", step)
    case, sizes, K = problems.PROJECTIONS
    L, ids, tokens, _, _ = problems.CASES[case]
    for (unit, rows), (act, own), n in itertools.product(sizes.items(), problems.DTYPES.values(), (2, 3)):
        masks = [_mask("rows", unit, L, size, K) for size in rows[:n]]
        yield layer_step(masks, torch.tensor(ids), tokens, act, own)
    yield lambda recorder: launch_shipped(recorder.chip, [128, 256], EDGES)
    yield lambda recorder: launch_shipped(recorder.chip, [256], EVEN)
    yield from _optimizer_steps()
    for config, dtype in itertools.product(problems.tiny_models().values(), (torch.float32, torch.bfloat16)):
        yield _tiny_model_step(config, dtype)


def launch_shipped(chip: str, rows: list[int], columns: int, unit: int = 128) -> None:
    """The row kernels with every block size of their tables, as `tests/triton_kernels/test_shipped_rows.py`.

    For weights [rows, columns]; columns that no block divides are tried in half precision only.
    """
    L, ids, tokens = 3, 4, 37
    plan = Plan(randn(ids, dtype=torch.int64), tokens, L)
    masks = [randn(L, n, dtype=torch.int64) for n in rows], [randn(L, dtype=torch.int64) for _ in rows]
    for table, grad in ((ROW_MATMUL, False), (ROW_MATMUL_T, False), (ROW_OWNED_GRAD, True), (ROW_TURN_GRAD, True)):
        for kind in [kind for own, kind in table if own == chip]:
            act, own = _KINDS[kind]
            x, packed = randn(ids * tokens, columns, dtype=act), [randn(ids * tokens, n, dtype=act) for n in rows]
            weights, biases = [randn(n, columns, dtype=own) for n in rows], [randn(n, dtype=own) for n in rows]
            for config in table[chip, kind] if kind == "half" or columns == EVEN else ():
                options = {"config": config, "allow_tf32": kind == "tf32"}
                if grad:
                    units = [unit if table is ROW_OWNED_GRAD else 1] * len(rows)
                    row_weight_grad(
                        packed, x, *masks, plan, rows, weight_dtype=own, units=units, with_bias=True, **options
                    )
                elif table is ROW_MATMUL:
                    row_matmul(x, weights, *masks, plan, rows, biases, **options)
                else:
                    row_matmul_t(packed, weights, *masks, plan, randn(columns, dtype=own), **options)


def _optimizer_steps() -> Iterator[Step]:
    """Steps of the optimiser: on weights that live one by one, and on those that a vector instruction moves."""
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    n = 64
    for dtype, kind, lr in itertools.product(DTYPES, ("rows", "columns"), (1e-3, randn(dtype=torch.float32))):
        live = live_of(_mask(kind, 1, 2, n, n), [0])
        tensors = (randn(n, n, dtype=dtype) for _ in range(4))
        job = Job(*tensors, randn(dtype=torch.float32), live.words.to(DEVICE), live.cell)
        yield lambda _, job=job, lr=lr: live_adamw([job], lr=lr, **options)  # type: ignore[misc]


def _tiny_model_step(config: object, dtype: torch.dtype) -> Step:
    from transformers import AutoModel

    model = AutoModel.from_config(config).to(dtype)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b", "c"], 0.5, seed=0, units="both"), verify=False)
    tokens = torch.zeros(5, 6, dtype=torch.int64, device=DEVICE)
    ids = torch.tensor([2, 0, 0, -1, 1])  # on the CPU, as in the tests: ids on a device may not ask for everything
    # A whole mask, as transformers looks at positions or at a mask of tokens, which waits for the device.
    inputs = {"input_ids": tokens, "attention_mask": randn(5, 1, 6, 6, dtype=dtype), "language_ids": ids}
    return model_step(model.to(DEVICE), inputs, None)


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
