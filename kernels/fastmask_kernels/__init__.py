"""Triton kernels for many subnetworks of one weight in one batch; imports torch and triton only.

`plan` sorts a batch by language; `row_matmul` and `row_weight_grad` work on gathered live rows, `packing` moves
activations between their full and their packed width; `tile_layout` lists the live tiles of a mask and
`tile_matmul` and `tile_weight_grad` walk them. `naive` is the definition of each, in plain torch.
"""
