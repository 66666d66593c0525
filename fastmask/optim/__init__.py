"""AdamW without the leak: a step moves only what is live for some language of the batch.

`adamw` is the optimizer, which keeps moments of what may learn; `noticed` knows the languages that gradients come from;
`step` steps what of each parameter is live (`fastmask.live`), and the rows of embeddings.
"""

from fastmask.optim.adamw import LiveAdamW
from fastmask.optim.step import by_rows, can_be_sparse, sparse_gradients

__all__ = ["LiveAdamW", "by_rows", "can_be_sparse", "sparse_gradients"]
