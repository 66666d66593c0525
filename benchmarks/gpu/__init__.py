"""`make gpu` (`python -m benchmarks.gpu`): is every kernel right on this GPU (`gate`), and if so, how fast is it?

Cases and rows are those of `python -m benchmarks`. Needs torch, triton, transformers, numpy and pytest, nothing else.
`predicted` and `recorded` need no GPU: what is expected, and what layers launch.
"""
