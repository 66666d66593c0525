"""`fastmask predict`: CoNLL-U in, CoNLL-U out."""

from __future__ import annotations

import argparse

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Parse one file with a language's subnetwork, or with the full network."""
    from fastmask.parsing.evaluation import predict_file
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run

    loaded = load_run(options.run)
    loaded.parser.to(device_of(options.device))
    count = predict_file(loaded.parser, options.input, options.output, options.language)
    print(f"{count} sentences written to {options.output}")
