"""Triton kernels of fastmask: not written yet; `fastmask` runs its torch path on every device."""
