"""Gradients summed over processes, where `DistributedDataParallel` does not do it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_gradients"]

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: few calls, and not a second copy of all gradients


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace every `.grad` by its sum over all processes; all of them call this with the same parameters.

    A parameter without a gradient counts as zeros where others have one, and stays without where none has.

    Args:
        parameters: dense, of any dtypes; those that do not require a gradient are left out.
        bucket_bytes: gradients are sent together up to about this size.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    gradients = []
    for parameter, somewhere in zip(trained, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype and device, up to `limit` bytes together, or a single larger one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        fits = bucket and size + n_bytes <= limit
        if bucket and not (fits and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += n_bytes
    if bucket:
        yield bucket
