"""`make gpu` (`python -m benchmarks.gpu`): is every kernel right on this GPU, and if so, how fast is it?

`gate` runs the correctness tests; where one fails, what is timed is marked as unchecked. Then each section (`layers`,
`encoder`, `small`, `sweep`) runs in a process of its own, so that one that crashes or hangs loses nothing but itself.
`report` prints and writes after each; `recorded` says, without a GPU, what all of it launches. What
`python -m benchmarks` measures with (`measure`, `memory`, `product`, `variants`, `checking`) is used here, too.

Needs torch, triton, transformers, numpy and pytest, and nothing else.
"""
