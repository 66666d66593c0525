"""`python -m benchmarks.gpu.recorded`: what each layer runs on a GPU, counted without one.

Masked layers and models run on the recorder's device, whose tensors have no memory: nothing is computed. A pass begins
with what comes between two of a training: a new batch's language ids, and parameters that an optimizer has changed.
The table counts, for layers of the sections, Triton launches and torch operations of a forward and backward pass, and
apart from them those that make the batch's plan.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from fastmask_kernels.recorder import DEVICE, Launch, Operation, Recorder
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.encoder import encoder_of, subnets_of
from benchmarks.cases.op import mask_of
from benchmarks.gpu.sections import BITS, BLOCKS_LEFT, LAYERS, UNITS
from benchmarks.setting import Setting
from fastmask import operators
from fastmask.masks import UNPACKED
from fastmask.operators import compute_projections
from fastmask.torch_path.layers import NONE

__all__ = ["Pass", "counts", "encoder_pass", "forced", "layer_pass", "model_pass", "origin", "randn", "record"]

Pass = Callable[[], object]  # forward and backward


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
        _update([*weights, *biases])
        ys = compute_projections(x, weights, on_device, ids.to(DEVICE), biases, widths, activation)
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
        _update(list(model.parameters()))
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


@torch.no_grad()
def _update(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.zero_()


@contextmanager
def forced() -> Iterator[None]:
    """Masked layers take the Triton path, whatever the device."""
    before, operators.FORCED = operators.FORCED, "triton"
    try:
        yield
    finally:
        operators.FORCED = before


def record(run: Pass, chip: str = "sm_90") -> Recorder:
    """What a pass runs once everything is there that is kept between passes."""
    with forced():
        for _ in range(2):
            with Recorder(chip) as recorder:
                run()
    return recorder


# ---- the table

PLACES = ("forward", "backward", "plan")


def origin(event: Launch | Operation) -> str:
    """Who asked for it: "plan" (once for a batch), "masked" (a masked layer), or "other" (the model, the engine)."""
    ours = list(itertools.takewhile(lambda name: name.split(".")[0] in ("fastmask", "fastmask_kernels"), event.callers))
    if not ours:
        return "other"
    return "plan" if any(name.rpartition(".")[2] in ("plan", "tables", "routing") for name in ours) else "masked"


def counts() -> dict[str, dict[str, tuple[int, int]]]:
    """By layer and place: (Triton launches, torch operations) of one pass."""
    return {name: _counted(record(run)) for name, run in _layers()}


def _counted(recorder: Recorder) -> dict[str, tuple[int, int]]:
    places = {"masked": lambda event: event.phase, "plan": lambda event: "plan", "other": lambda event: ""}
    found = Counter((places[origin(event)](event), isinstance(event, Launch)) for event in recorder.events)
    return {place: (found[place, True], found[place, False]) for place in PLACES}


def _layers() -> Iterator[tuple[str, Pass]]:
    yield "BERT layer, heads and neurons", encoder_pass(LAYERS.setting)
    dtype = torch.bfloat16
    for job in (*UNITS.values(), BLOCKS_LEFT[0.5], BITS[8]):
        setting = replace(job.setting, present=8)
        masks = [mask_of(setting)]
        for packed in (True, False) if masks[0].kind in ("rows", "columns") else (False,):
            run = layer_pass(masks, setting.ids(), setting.tokens, dtype, dtype, packed)
            yield f"{setting.unit}{', packed' if packed else ''}", run


def main() -> None:
    """Print the table."""
    print("8 languages; Triton launches + torch operations of one pass")
    print(f"{'':<32}" + "".join(f"{place:>10}" for place in PLACES))
    for name, found in counts().items():
        print(f"{name:<32}" + "".join(f"{f'{found[place][0]} + {found[place][1]}':>10}" for place in PLACES))


if __name__ == "__main__":
    main()
