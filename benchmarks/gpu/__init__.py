"""`make gpu` (`python -m benchmarks.gpu`): is every kernel right on this GPU, and if so, how fast is it?

`gate` runs the correctness tests; where one fails, rows say that they are unchecked. Then a process of its own
(`worker`) measures each section's jobs (`sections`): cases and rows are those of `python -m benchmarks`, which also
reads the file. Beside what is measured stands what was expected (`predicted`).

Without a GPU, on tensors that have no memory: `passes` run layers, `recorded` counts what they launch, `launched` lists
all that `make gpu` would (`problems` are those of the gate), and `host` times the way to a launch.

Needs torch, triton, transformers, numpy and pytest, and nothing else.
"""
