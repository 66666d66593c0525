"""What a language has learnt, as a sparse change of the model it started from.

`part` is the change of one parameter, `delta` what users hold, `adding` puts changes on models and takes them off,
`storage` reads and writes files.
"""

from fastmask.deltas.delta import Delta

__all__ = ["Delta"]
