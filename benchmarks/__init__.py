"""Benchmarks: what subnetworks save on a CPU and how near the limit they run, each rival proven equal first.

`python -m benchmarks` (`__main__`) measures a *case* (`cases/`) at a `setting`: `running` builds the case, has it prove
every implementation against float64, times all of them in turn and counts bytes (`measure`), and makes a `row` of each.
`baselines` holds what people would use instead. `tables` and `pictures` show rows, `targets` says what they must reach.
docs/benchmarks.md says it to users.

`python -m benchmarks.gpu` (`make gpu`) first checks the Triton kernels on a machine's GPU, then measures them.
`pytest benchmarks --benchmark-only` runs small sizes under pytest-benchmark.
"""
