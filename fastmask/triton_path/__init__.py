"""The Triton path of the masked layers: what `torch_path` computes, by the kernels of `fastmask_kernels`.

`plans` sorts a batch by language once, `layouts` keeps what the kernels read of a mask, `layers` says what each mask
kind launches. Importing it imports Triton, so only `operators.paths` does, and only when a GPU is there.
"""
