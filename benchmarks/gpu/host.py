"""The host's time to launch a layer, on any machine: no kernel of Triton's is launched, and PyTorch's are tiny.

Tensors of a few numbers lie on the CPU, so that PyTorch's operations cost what it takes to call them, and Triton's
launch path ends at a stub. What is timed is Python, PyTorch's dispatcher and autograd, the making of results, and the
way to a kernel's launch, on both sides alike. Left out, on both sides, are the driver's own launches and cuBLAS's
choice of an algorithm, about as long on either. In float32: PyTorch's CPU products in half precision take far longer
to call. There, two casts of gradients come to ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from fastmask_kernels.recorder import Stub
from torch import Tensor, nn

import fastmask as fm
from benchmarks.measure import Side, quartiles, rounds
from benchmarks.variants import encoder_of
from fastmask.models.routing import Route

__all__ = ["host_time"]

CPU = torch.device("cpu")
LANGUAGES = 8
HIDDEN, HEADS, FFN = 128, 2, 256  # heads of 64, as in BERT


def host_time(seconds: float = 10.0, chip: str = "sm_90", passes: int = 20) -> str:
    """Forward and backward of a BERT layer's six linear layers and its activation, masked over dense, in turn.

    Heads and neurons at 50%, as a model calls them but without what is between them and the same on both sides
    (attention, LayerNorm, residuals). The plan, made once for all layers of a batch, is there already.
    """
    torch.set_num_threads(1)  # several would wait for each other
    dense, model = (encoder_of(HIDDEN, 1, HEADS, FFN, 1, CPU, torch.float32) for _ in range(2))
    names = [f"language {i}" for i in range(LANGUAGES)]
    fm.attach(model, fm.Subnetworks.random(model.config, names, 0.5, seed=0, units="both"), verify=False)
    route = Route(torch.arange(LANGUAGES), None)  # as with ids on a GPU
    x = torch.randn(LANGUAGES, 1, HIDDEN).requires_grad_()

    def several(step: Callable[[], object]) -> Side:
        return Side(lambda: [step() for _ in range(passes)])

    with Stub(chip, "cpu"), model._fastmask.router.using(route):  # type: ignore[union-attr]
        times = rounds([several(_step(own, x)) for own in (dense, model)], CPU, seconds, least=8)
    low, middle, high = quartiles([ours / theirs for theirs, ours in zip(*times, strict=True)])
    dense_ms, our_ms = (statistics.median(own) / passes for own in times)
    return (
        f"host time of a BERT layer, forward + backward: {middle:.2f} times nn.Linear's ({low:.2f} to {high:.2f}), "
        f"{our_ms:.3f} ms and {dense_ms:.3f} ms, {len(times[0])} pairs"
    )


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    layer = model.encoder.layer[0]  # type: ignore[union-attr,index]
    own = layer.attention.self
    linear = [own.query, own.key, own.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense]
    query, key, value, out, up, down = linear
    leaves = [x, *(parameter for module in linear for parameter in module.parameters())]
    upstream: list[Tensor] = []

    def step() -> object:
        q, k, v = query(x), key(x), value(x)
        y = down(layer.intermediate.intermediate_act_fn(up(out(q))))
        if not upstream:
            upstream[:] = [torch.ones_like(part) for part in (y, k, v)]
        return torch.autograd.grad([y, k, v], leaves, upstream)

    return step
