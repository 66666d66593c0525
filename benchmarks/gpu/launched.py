"""Everything that `make gpu` launches, its gate and its sections together, on the recorder's device.

`variants` are all kernels that it would compile on a chip; `python -m fastmask_kernels.compile_report` compiles them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from fastmask_kernels.chips import chip_of
from fastmask_kernels.live_adamw import DTYPES, Job, live_adamw
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import DEVICE, Recorder, Variant
from fastmask_kernels.row_configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad

import fastmask as fm
from benchmarks.cases.op import mask_of, mask_over
from benchmarks.gpu import problems
from benchmarks.gpu.recorded import Pass, encoder_pass, forced, layer_pass, model_pass, randn
from benchmarks.gpu.sections import SECTIONS
from fastmask.live import live_of
from fastmask.torch_path.layers import NONE

__all__ = ["EVEN", "gate", "launch_shipped", "sections", "variants", "variants_of"]

EVEN, EDGES = 256, 48  # columns that every block of the row kernels divides, or none
_BF16, _FP32 = torch.bfloat16, torch.float32
_KINDS = {"half": (_BF16, _BF16), "master": (_BF16, _FP32), "tf32": (_FP32, _FP32), "ieee": (_FP32, _FP32)}


def variants(chip: str) -> list[Variant]:
    """Every kernel that `make gpu` compiles on a chip."""
    return variants_of(chip, itertools.chain(gate(), sections()))


def variants_of(chip: str, passes: Iterable[Pass]) -> list[Variant]:
    """What is launched, once each, in the order of the first launches."""
    found: dict[tuple[object, ...], Variant] = {}
    with forced():
        for run in passes:
            with Recorder(chip) as recorder:
                run()
            for launch in recorder.launches:
                found.setdefault(launch.variant.key, launch.variant)
    return list(found.values())


def sections(languages: int | None = None) -> Iterator[Pass]:
    """The passes of what is timed, each setting once; on request with so many languages. Densities change no launch."""
    settings = [replace(job.setting, density=0.5) for jobs in SECTIONS.values() for job in jobs]
    for setting in dict.fromkeys(setting for setting in settings if not setting.compiled):
        if languages is not None:
            setting = replace(setting, languages=languages, present=min(setting.present, languages))
        if setting.case == "encoder":
            yield encoder_pass(setting)
        else:
            yield layer_pass([mask_of(setting)], setting.ids(), setting.tokens, _BF16, _BF16)


def gate() -> Iterator[Pass]:
    """The passes of the tests: `tests/gpu` on every problem."""
    for (kind, case), dtypes in itertools.product(problems.cases(), problems.DTYPES):
        for packed in (False, True) if case in problems.PACKED else (False,):
            yield _layer(kind, case, dtypes, packed)
    for case, dtypes, activation in itertools.product(problems.PACKED, problems.DTYPES, problems.ACTIVATIONS):
        yield _layer("columns", case, dtypes, True, activation)
    case, rows_of, K = problems.PROJECTIONS
    L, ids, tokens, _, _ = problems.CASES[case]
    for (unit, rows), (act, own), n in itertools.product(rows_of.items(), problems.DTYPES.values(), (2, 3)):
        masks = [_mask("rows", unit, L, N, K) for N in rows[:n]]
        yield layer_pass(masks, torch.tensor(ids), tokens, act, own)
    yield partial(launch_shipped, [128, 256], EDGES)
    yield partial(launch_shipped, [256], EVEN)
    yield from _optimizer_steps()
    for config, dtype in itertools.product(problems.tiny_models().values(), (_FP32, _BF16)):
        yield _tiny_model(config, dtype)


def _layer(name: str, case: str, dtypes: str, packed: bool, activation: str = NONE) -> Pass:
    (kind, unit), (L, ids, tokens, N, K), (act, own) = (
        problems.KINDS[name], problems.CASES[case], problems.DTYPES[dtypes],
    )  # fmt: skip
    masks = [_mask(kind, unit, L, *problems.sides(name, N, K))]
    return layer_pass(masks, torch.tensor(ids), tokens, act, own, packed, activation, tf32=dtypes == "tf32")


def _mask(kind: str, unit: int, L: int, N: int, K: int) -> fm.Mask:
    generator = torch.Generator().manual_seed(0)  # the same kernels in every run
    return mask_over(kind, unit, N, K, lambda *shape: torch.rand(L, *shape, generator=generator) < 0.5)


def launch_shipped(rows: list[int], columns: int, unit: int = 128) -> None:
    """The row kernels with every block size of their tables, as `tests/triton_kernels/test_shipped_rows.py`.

    For weights [rows, columns]; columns that no block divides are tried in half precision only.
    """
    chip, L, ids, tokens = chip_of(torch.device(DEVICE)), 3, 4, 37
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


def _optimizer_steps() -> Iterator[Pass]:
    """Steps of the optimizer: on weights that live one by one, and on those that a vector instruction moves."""
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    n = 64
    for dtype, kind, lr in itertools.product(DTYPES, ("rows", "columns"), (1e-3, randn(dtype=torch.float32))):
        live = live_of(_mask(kind, 1, 2, n, n), [0])
        tensors = (randn(n, n, dtype=dtype) for _ in range(4))
        job = Job(*tensors, randn(dtype=torch.float32), live.words.to(DEVICE), live.cell)
        yield partial(live_adamw, [job], lr=lr, **options)


def _tiny_model(config: object, dtype: torch.dtype) -> Pass:
    from transformers import AutoModel

    model = AutoModel.from_config(config).to(dtype)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b", "c"], 0.5, seed=0, units="both"), verify=False)
    # A whole mask, as transformers looks at positions or at a mask of tokens, which waits for the device. Ids are on
    # the CPU, as in the tests: on a device they may not ask for everything.
    batch = {"input_ids": randn(5, 6, dtype=torch.int64), "attention_mask": randn(5, 1, 6, 6, dtype=dtype)}
    return model_pass(model, batch | {"language_ids": torch.tensor([2, 0, 0, -1, 1])}, None)
