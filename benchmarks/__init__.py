"""Benchmarks: `python -m benchmarks` measures what the README claims and fails where a row falls short."""
