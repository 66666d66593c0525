"""`python -m benchmarks.gpu.recorded`: what each layer runs on a GPU, counted without one.

Masked layers run on the recorder's device, whose tensors have no memory: nothing is computed. A pass begins with what
comes between two of a training: a new batch's language ids, and parameters that an optimizer has changed. The table
counts Triton launches and torch operations of a forward and backward pass, apart from those of the batch's plan.

`variants` are all kernels that `make gpu` would compile on a chip, its gate and its sections together;
`python -m fastmask_kernels.compile_report` compiles them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from fastmask_kernels import live_adamw
from fastmask_kernels.chips import chip_of
from fastmask_kernels.configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import DEVICE, Launch, Operation, Recorder, Variant
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.encoder import encoder_of, subnets_of
from benchmarks.cases.op import mask_of, mask_over
from benchmarks.gpu import sections as wanted
from benchmarks.row import Setting
from fastmask import operators
from fastmask.live import live_of
from fastmask.masks import UNPACKED
from fastmask.torch_path.layers import NONE, Layers

Pass = Callable[[], object]  # forward and backward
EVEN, EDGES = 256, 48  # columns that every block of the row kernels divides, or none


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def layer_pass(
    masks: list[fm.Mask], ids: Tensor, tokens: int, act: torch.dtype, own: torch.dtype, packed: bool = True,
    activation: str = NONE, tf32: bool = False,
) -> Pass:  # fmt: skip
    """Layers that share their input, on `tokens` tokens for each of `ids` [B]; `packed` as in an attached model.

    Activations are of the dtype `act`, weights of `own`; `tf32` is PyTorch's switch for products of float32.
    """
    packed = packed and masks[0].kind in ("rows", "columns")
    widths = [max(mask.live_counts()) if packed else UNPACKED for mask in masks]
    K = widths[0] if packed and masks[0].kind == "columns" else masks[0].in_features
    on_device = [mask.to(DEVICE) for mask in masks]
    weights = [nn.Parameter(randn(mask.out_features, mask.in_features, dtype=own)) for mask in masks]
    biases = [nn.Parameter(randn(mask.out_features, dtype=own)) for mask in masks]
    x = randn(len(ids), tokens, K, dtype=act).requires_grad_()

    def run() -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        for parameter in (*weights, *biases):
            nn.init.zeros_(parameter)
        ys = operators.run(Layers(on_device, widths, activation), x, weights, biases, ids.to(DEVICE))
        torch.autograd.grad(ys, [x, *weights, *biases], [torch.empty_like(y) for y in ys])

    return run


def model_pass(model: nn.Module, batch: dict[str, Tensor], ids: Tensor | None) -> Pass:
    """A whole model in training; its `ids`, if there are any, are on the device."""
    model.to(DEVICE)
    for layer in model.modules():
        if isinstance(layer, fm.MaskedLinear):
            layer.mask = layer.mask.to(DEVICE)  # masks do not follow weights that have no memory

    def run() -> None:
        model.zero_grad()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        y = model(**batch, **({} if ids is None else {"language_ids": ids.to(DEVICE)}))[0]
        y.backward(torch.empty_like(y))

    return run


def encoder_pass(setting: Setting, masked: bool = True) -> Pass:
    """One layer of a setting's encoder in bfloat16, masked or dense."""
    model = encoder_of(setting.sizes, 1, setting.tokens).to(torch.bfloat16)
    if masked:
        fm.attach(model, subnets_of(model, setting), verify=False)
    x = randn(setting.batch, setting.tokens, setting.sizes.hidden, dtype=torch.bfloat16)
    return model_pass(model, {"inputs_embeds": x}, setting.ids() if masked else None)


def forced() -> AbstractContextManager[object]:
    """Masked layers take the Triton path, whatever the device."""
    return patch.object(operators, "FORCED", "triton")


# ---- the table


def record(run: Pass, chip: str = "sm_90") -> Recorder:
    """What a pass runs once everything is there that is kept between passes."""
    with forced():
        for _ in range(2):
            with Recorder(chip) as recorder:
                run()
    return recorder


def origin(event: Launch | Operation) -> str:
    """Who asked for it: "plan" (once for a batch), "masked" (a masked layer), or "other" (the model, the engine)."""
    ours = list(itertools.takewhile(lambda name: name.split(".")[0] in ("fastmask", "fastmask_kernels"), event.callers))
    if not ours:
        return "other"
    return "plan" if any(name.rpartition(".")[2] in ("plan", "tables", "routing") for name in ours) else "masked"


def _layers() -> Iterator[tuple[str, Pass]]:
    yield "BERT layer, heads and neurons", encoder_pass(wanted.LAYERS.setting)
    for job in (*wanted.UNITS.values(), wanted.BLOCKS_LEFT[0.5], wanted.BITS[8]):
        setting = replace(job.setting, present=8)
        masks = [mask_of(setting)]
        for packed in (True, False) if masks[0].kind in ("rows", "columns") else (False,):
            run = layer_pass(masks, setting.ids(), setting.tokens, torch.bfloat16, torch.bfloat16, packed)
            yield f"{setting.unit}{', packed' if packed else ''}", run


def main() -> None:
    """Print, by layer and place, the Triton launches and torch operations of one pass."""
    places = ("forward", "backward", "plan")
    print("8 languages; Triton launches + torch operations of one pass")
    print(f"{'':<32}" + "".join(f"{place:>10}" for place in places))
    for name, run in _layers():
        found: Counter[tuple[str, bool]] = Counter()
        for event in record(run).events:
            place = {"masked": event.phase, "plan": "plan", "other": ""}[origin(event)]
            found[place, isinstance(event, Launch)] += 1
        print(f"{name:<32}" + "".join(f"{f'{found[place, True]} + {found[place, False]}':>10}" for place in places))


# ---- everything that `make gpu` launches


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
    settings = [replace(job.setting, density=0.5) for jobs in wanted.SECTIONS.values() for job in jobs]
    for setting in dict.fromkeys(setting for setting in settings if not setting.compiled):
        if languages is not None:
            setting = replace(setting, languages=languages, present=min(setting.present, languages))
        if setting.case == "encoder":
            yield encoder_pass(setting)
        else:
            yield layer_pass([mask_of(setting)], setting.ids(), setting.tokens, torch.bfloat16, torch.bfloat16)


def gate() -> Iterator[Pass]:
    """The passes of the tests: `tests/gpu` on every problem."""
    from transformers import AutoModel

    for (kind, case), dtypes in itertools.product(wanted.cases(), wanted.DTYPES):
        for packed in (False, True) if case in wanted.PACKED else (False,):
            yield _layer(kind, case, dtypes, packed)
    for case, dtypes, activation in itertools.product(wanted.PACKED, wanted.DTYPES, wanted.ACTIVATIONS):
        yield _layer("columns", case, dtypes, True, activation)
    case, rows_of, K = wanted.PROJECTIONS
    L, ids, tokens, _, _ = wanted.CASES[case]
    for (unit, rows), (act, own), n in itertools.product(rows_of.items(), wanted.DTYPES.values(), (2, 3)):
        masks = [_mask("rows", unit, L, N, K) for N in rows[:n]]
        yield layer_pass(masks, torch.tensor(ids), tokens, act, own)
    yield partial(launch_shipped, [128, 256], EDGES)
    yield partial(launch_shipped, [256], EVEN)
    # The optimizer, on weights that live one by one, and on those that a vector instruction moves.
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    n, rates = 64, (1e-3, randn(dtype=torch.float32))
    for dtype, kind, lr in itertools.product(live_adamw.DTYPES, ("rows", "columns"), rates):
        live = live_of(_mask(kind, 1, 2, n, n), [0])
        tensors = (randn(n, n, dtype=dtype) for _ in range(4))
        job = live_adamw.Job(*tensors, randn(dtype=torch.float32), live.words.to(DEVICE), live.cell)
        yield partial(live_adamw.live_adamw, [job], lr=lr, **options)
    for config, dtype in itertools.product(wanted.tiny_models().values(), (torch.float32, torch.bfloat16)):
        model = AutoModel.from_config(config).to(dtype)
        fm.attach(model, fm.Subnetworks.random(config, ["a", "b", "c"], 0.5, seed=0, units="both"), verify=False)
        # A whole mask, as transformers looks at positions or at a mask of tokens, which waits for the device. Ids are
        # on the CPU, as in the tests: on a device they may not ask for everything.
        batch = {"input_ids": randn(5, 6, dtype=torch.int64), "attention_mask": randn(5, 1, 6, 6, dtype=dtype)}
        yield model_pass(model, batch | {"language_ids": torch.tensor([2, 0, 0, -1, 1])}, None)


def _layer(name: str, case: str, dtypes: str, packed: bool, activation: str = NONE) -> Pass:
    (kind, unit), (L, ids, tokens, N, K), own = wanted.KINDS[name], wanted.CASES[case], wanted.DTYPES[dtypes]
    masks = [_mask(kind, unit, L, *wanted.sides(name, N, K))]
    return layer_pass(masks, torch.tensor(ids), tokens, *own, packed, activation, tf32=dtypes == "tf32")


def _mask(kind: str, unit: int, L: int, N: int, K: int) -> fm.Mask:
    generator = torch.Generator().manual_seed(0)  # the same kernels in every run
    return mask_over(kind, unit, N, K, lambda *shape: torch.rand(L, *shape, generator=generator) < 0.5)


def launch_shipped(rows: list[int], columns: int, unit: int = 128) -> None:
    """The row kernels with every block size of their tables, as `tests/triton_kernels/test_shipped_rows.py` does.

    For weights [rows, columns]; columns that no block divides are tried in half precision only.
    """
    chip, L, ids, tokens = chip_of(torch.device(DEVICE)), 3, 4, 37
    plan = Plan(randn(ids, dtype=torch.int64), tokens, L)
    masks = [randn(L, n, dtype=torch.int64) for n in rows], [randn(L, dtype=torch.int64) for _ in rows]
    kinds = {"half": wanted.DTYPES["bf16"], "ieee": wanted.DTYPES["fp32"], **wanted.DTYPES}
    for table in (ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD):
        for kind in [kind for own, kind in table if own == chip and (kind == "half" or columns == EVEN)]:
            act, own = kinds[kind]
            x, packed = randn(ids * tokens, columns, dtype=act), [randn(ids * tokens, n, dtype=act) for n in rows]
            weights, biases = [randn(n, columns, dtype=own) for n in rows], [randn(n, dtype=own) for n in rows]
            for config in table[chip, kind]:
                options = {"config": config, "allow_tf32": kind == "tf32"}
                if table is ROW_MATMUL:
                    row_matmul(x, weights, *masks, plan, rows, biases, **options)
                elif table is ROW_MATMUL_T:
                    row_matmul_t(packed, weights, *masks, plan, randn(columns, dtype=own), **options)
                else:
                    options |= {"units": [unit if table is ROW_OWNED_GRAD else 1] * len(rows), "weight_dtype": own}
                    row_weight_grad(packed, x, *masks, plan, rows, with_bias=True, **options)


if __name__ == "__main__":
    main()
