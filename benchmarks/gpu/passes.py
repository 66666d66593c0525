"""Passes of masked layers and models on the recorder's device, whose tensors have no memory: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from fastmask_kernels.recorder import DEVICE, Recorder
from torch import Tensor, nn

import fastmask as fm
from benchmarks.setting import Setting
from benchmarks.variants import encoder_of, subnets_of
from fastmask import operators
from fastmask.masks import UNPACKED
from fastmask.operators import compute_projections
from fastmask.torch_path.activations import NONE

__all__ = ["Step", "encoder_step", "forced", "layer_step", "model_step", "randn", "record"]

Step = Callable[[Recorder], object]  # a forward and backward pass that tells the recorder where it is


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def layer_step(
    masks: list[fm.Mask], ids: Tensor, tokens: int, act: torch.dtype, own: torch.dtype, packed: bool = True,
    activation: str = NONE,
) -> Step:  # fmt: skip
    """Layers that share their input, on `tokens` tokens for each of `ids` [B]; `packed` as in an attached model.

    Activations are of the dtype `act`, weights of `own`.
    """
    packed = packed and masks[0].kind in ("rows", "columns")
    widths = [max(mask.live_counts()) if packed else UNPACKED for mask in masks]
    K = widths[0] if packed and masks[0].kind == "columns" else masks[0].in_features
    on_device = [mask.to(DEVICE) for mask in masks]
    weights = [nn.Parameter(randn(mask.out_features, mask.in_features, dtype=own)) for mask in masks]
    biases = [nn.Parameter(randn(mask.out_features, dtype=own)) for mask in masks]
    x = randn(len(ids), tokens, K, dtype=act).requires_grad_()

    def step(recorder: Recorder) -> None:
        device_ids = _next_batch(recorder, ids, [*weights, *biases])
        recorder.phase = "forward"
        ys = compute_projections(x, weights, on_device, device_ids, biases, widths, activation)
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


def encoder_step(setting: Setting, masked: bool = True, dtype: torch.dtype = torch.bfloat16) -> Step:
    """One layer of a setting's encoder, masked or dense."""
    sizes, tokens = setting.sizes, setting.tokens
    model = encoder_of(sizes.hidden, 1, sizes.heads, sizes.ffn, tokens, torch.device("cpu"), dtype)
    if masked:
        names = [f"language {i}" for i in range(setting.languages)]
        fm.attach(model, subnets_of(model, names, setting.density, setting.unit), verify=False)
    x = randn(setting.batch, tokens, sizes.hidden, dtype=dtype)
    return model_step(model.to(DEVICE), {"inputs_embeds": x}, setting.ids() if masked else None)


def _next_batch(recorder: Recorder, ids: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """What comes between two passes: new ids, and parameters that an optimiser has changed."""
    recorder.phase = "update"
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    return ids.to(DEVICE)


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
        for _ in range(2):
            with Recorder(chip) as recorder:
                step(recorder)
    return recorder
