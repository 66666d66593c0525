"""AdamW without the leak: a step moves only what is live for some language of the batch.

`live` knows which weights of each parameter those are, `arrivals` notes which languages a gradient came from.
`compiled` takes the step as one pass over memory on a CPU, with `vector_code` for its instructions; `plain` takes it in
PyTorch. `adamw` is the optimiser.
"""

from fastmask.optim.adamw import LiveAdamW

__all__ = ["LiveAdamW"]
