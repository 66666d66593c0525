"""`fastmask predict`: CoNLL-U in, CoNLL-U out."""

from __future__ import annotations

import argparse
import sys

from fastmask.files import check_writable, descriptor_of
from fastmask.literal import say

__all__ = ["run"]

STANDARD = "-"


def run(options: argparse.Namespace) -> None:
    """Parse one file with a language's subnetwork, or with the full network."""
    from fastmask.tasks.parsing.evaluation import predict_file
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run

    source = "/dev/stdin" if options.input == STANDARD else options.input
    target = "/dev/stdout" if options.output == STANDARD else options.output
    check_writable(target)
    loaded = load_run(options.run)
    loaded.parser.to(device_of(options.device))
    count = predict_file(loaded.parser, source, target, options.language)
    to_stdout = descriptor_of(target) == 1
    say(f"{count} sentences written to {options.output}", sys.stderr if to_stdout else sys.stdout)
