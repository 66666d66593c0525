"""Benchmarks: what subnetworks save and how near the limit they run, each rival proven equal first.

`python -m benchmarks` (`__main__`) measures a *case* (`cases/`) at a *setting*: `measure` builds the case, has it prove
every implementation against float64, times all of them in turn, counts bytes, and makes a `row` of each. `baselines` is
what people would use instead; `tables` shows rows, `targets` says what they must reach. docs/benchmarks.md says more.
`python -m benchmarks.gpu` (`make gpu`) checks and measures the Triton kernels; `pytest benchmarks` runs small sizes.
"""
