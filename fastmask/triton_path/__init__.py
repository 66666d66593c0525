"""The Triton path of the masked layers: what `torch_path` computes, by the kernels of `fastmask_kernels`.

`layers` says what each mask kind launches, `tables` keeps what the kernels read of a mask and a batch. Importing it
imports Triton, so only `operators` does, and only when a GPU is there.
"""
