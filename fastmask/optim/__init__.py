"""AdamW without the leak: a step moves only what is live for some language of the batch.

`arrivals` notes which languages a gradient came from, `step` steps what of each parameter is live (`fastmask.live`),
`adamw` is the optimizer.
"""

from fastmask.optim.adamw import LiveAdamW

__all__ = ["LiveAdamW"]
