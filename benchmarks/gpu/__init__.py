"""`make gpu` (`python -m benchmarks.gpu`): is every kernel right on this GPU, and if so, how fast is it?

`gate` runs the correctness tests; where one fails, rows say that they are unchecked. Then a process of its own measures
each section's jobs (`sections`): cases and rows are those of `python -m benchmarks`, which also reads the file. Beside
what is measured stands what was expected (`predicted`).

Without a GPU, on tensors that have no memory: `recorded` counts what layers launch, `launched` lists all that `make
gpu` would (`problems` are those of the gate).

Needs torch, triton, transformers, numpy and pytest, and nothing else.
"""
