"""The host's time to launch a layer, on any machine: no kernel of Triton's is launched, and PyTorch's are tiny.

Tensors of a few numbers lie on the CPU, so that PyTorch's operations cost what it takes to call them, and Triton's
launch path ends at a stub. What is timed is Python, PyTorch's dispatcher and autograd, the making of results, and the
way to a kernel's launch, on both sides alike. Left out, on both sides, are the driver's own launches and cuBLAS's
choice of an algorithm, about as long on either. In float32: PyTorch's CPU products in half precision take far longer
to call. There, two casts of gradients come to ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from fastmask_kernels.recorder import Stub
from torch import Tensor, nn

import fastmask as fm
from benchmarks.measure import Ratio, ratio_of
from benchmarks.product import mixed_ids
from benchmarks.variants import encoder_of
from fastmask.models.routing import Route

__all__ = ["bert_sides", "host_time"]

CPU = torch.device("cpu")
LANGUAGES = 8
HIDDEN, HEADS, FFN = 128, 2, 256  # heads of 64, as in BERT


@contextmanager
def bert_sides() -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """Forward and backward of a BERT layer's six linear layers and its activation: dense, and masked as attached.

    Heads and neurons at 50%, as a model calls them but without what is between them and the same on both sides
    (attention, LayerNorm, residuals). The plan, made once for all layers of a batch, is there already.
    """
    dense, model = (encoder_of(HIDDEN, 1, HEADS, FFN, 1, CPU, torch.float32) for _ in range(2))
    names = [f"language {i}" for i in range(LANGUAGES)]
    fm.attach(model, fm.Subnetworks.random(model.config, names, 0.5, seed=0, units="both"), verify=False)
    route = Route(mixed_ids(LANGUAGES, LANGUAGES), None)  # as with ids on a GPU
    x = torch.randn(LANGUAGES, 1, HIDDEN).requires_grad_()
    with model._fastmask.router.using(route):  # type: ignore[union-attr]
        yield _step(dense, x), _step(model, x)


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


def host_time(seconds: float = 10.0, chip: str = "sm_90", passes: int = 20) -> Ratio:
    """Dense over masked, of the host's time for one layer's forward and backward pass, measured in turn.

    The process's own time: whatever else runs on the machine does not count.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with Stub(chip, "cpu"), bert_sides() as sides:
        end = time.perf_counter() + seconds
        while len(times[0]) < 10 or time.perf_counter() < end:
            for step, found in zip(sides, times, strict=True):
                step()
                start = time.process_time()
                for _ in range(passes):
                    step()
                found.append(1e3 * (time.process_time() - start) / passes)
    return ratio_of(*(found[2:] for found in times))  # the first rounds are a warm-up
