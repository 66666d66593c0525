"""Triton kernels for many subnetworks of one weight in one batch; imports torch and triton only.

`plan` sorts a batch by language. Rows (heads, neurons): `row_matmul`, `row_matmul_t` and `row_weight_grad` work on
gathered live rows; dW of heads has one program for each block (`row_owned_grad`), in that of neurons programs add to
one sum and take turns (`row_turn_grad`). `packing` moves activations between their full and their packed width. Blocks
and single weights: `tile_layout` lists the live tiles of a mask; `tile_matmul` and `tile_weight_grad` walk them, two
neighbouring tiles of 64 at once, under the names `masked_matmul` and `masked_weight_grad` below. `program_order` says
which program does what; `naive` defines each kernel in plain torch. `live_adamw` takes an optimizer's step on the live
part of many weights. `configs` chooses block sizes, which `autotune` measures; `recorder` sees, without a GPU, what
would be launched, and `compile_report` compiles it.
"""

from fastmask_kernels.packing import pack, unpack
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import tile_matmul as masked_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad as masked_weight_grad

__all__ = ["Plan", "TileLayout", "masked_matmul", "masked_weight_grad", "pack", "unpack"]
