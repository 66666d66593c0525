"""`make gpu` (`python -m benchmarks.gpu`): is every kernel right on this GPU, and if so, how fast is it?

`gate` runs the correctness tests; nothing is timed while one fails. Then each section (`layers`, `encoder`, `small`,
`sweep`) runs in a process of its own, so that one that crashes or hangs loses nothing but itself. `report`
prints and writes; what `python -m benchmarks` measures with (`measure`, `memory`, `product`, `variants`, `checking`) is
used here, too.

Needs torch, triton, transformers, numpy and pytest, and nothing else.
"""
