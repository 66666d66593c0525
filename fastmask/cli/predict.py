"""`fastmask predict`: CoNLL-U in, CoNLL-U out."""

from __future__ import annotations

import argparse
import sys
import warnings

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Parse one file with a language's subnetwork, or with the full network."""
    from fastmask.parsing.evaluation import predict_file
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run

    loaded = load_run(options.run)
    loaded.parser.to(device_of(options.device))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        count = predict_file(loaded.parser, options.input, options.output, options.language)
    for warning in caught:
        print(f"fastmask predict: warning: {warning.message}", file=sys.stderr)
    print(f"{count} sentences written to {options.output}")
