"""What the test of FSDP and DDP runs in two processes: each has half of every parameter, or all, and its own batch.

To run it: torchrun --nproc-per-node=2 fsdp_run.py
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import batch, tiny

import fastmask as fm

STEPS = 3


def main() -> None:
    """Train an attached model in shards, one under DDP by names, and one that is whole in both processes."""
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    whole = tiny("bert")
    fm.attach(whole, fm.Subnetworks.random(whole.config, ["a", "b", "c"], 0.5, seed=0, units="both"))
    sharded = copy.deepcopy(whole)
    for layer in sharded.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded.encoder.layer[0].intermediate.dense.weight, DTensor)

    with pytest.raises(TypeError, match="FSDP"):
        fm.LiveAdamW(sharded.parameters(), model=sharded)

    replicated = DistributedDataParallel(copy.deepcopy(whole), find_unused_parameters=True)
    inputs, ids = batch(4), torch.tensor([[0, 1, 2, 0], [2, 1, 1, -1]][rank])
    rows = [{"language": [*"abc", None][i]} for i in ids.tolist()]
    told = fm.LanguageCollator(lambda _: {}, replicated)(rows)
    models = ((whole, {"language_ids": ids}), (sharded, {"language_ids": ids}), (replicated, told))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model, _ in models]
    for _ in range(STEPS):
        for (model, languages), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(**inputs, **languages)[0].square().mean().backward()
        for p in whole.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        for optimizer in optimizers:
            optimizer.step()
    three = zip(whole.named_parameters(), sharded.parameters(), replicated.parameters(), strict=True)
    for (name, expected), found, of_ddp in three:
        torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-8, atol=1e-10, msg=name)
        torch.testing.assert_close(of_ddp, expected, rtol=1e-8, atol=1e-10, msg=name)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:  # lines of two processes may run into one
        print("equal", flush=True)
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down, after all is said


if __name__ == "__main__":
    main()
