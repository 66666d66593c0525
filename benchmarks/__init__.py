"""Benchmarks: what subnetworks save, where they break even, and how near the limit they run.

`python -m benchmarks` (`command`) measures *cases* (`cases/`, one file each) at *settings* (`setting`), in lists that
are `plans` or sweeps (`grid`). `running` builds a case, has it prove every implementation equal, times the sides in
turn (`measure`), counts bytes (`memory`) and makes a CSV `row` of each. `baselines` holds what people would use
instead, `product`, `variants` and `parser_bed` the operands, models and data that cases share, `targets` what the
numbers must be. `tables`, `pictures` and `against` show rows and compare them with an earlier run; `paper` counts what
was never run.

`python -m benchmarks.gpu` (`make gpu`) first checks the Triton kernels on a machine's GPU, then measures them.
`pytest benchmarks --benchmark-only` runs small sizes under pytest-benchmark.
"""
