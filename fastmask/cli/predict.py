"""`fastmask predict`: a file in, the same with predictions out (parsing: CoNLL-U; others: JSON lines)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastmask.cli.inputs import FILE, RUN
from fastmask.cli.options import add_device, output_file
from fastmask.cli.report import stream_beside
from fastmask.files import check_writable

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run", metavar="RUN", type=RUN, help="folder of a finished run")
    reads = "file to read, - for standard input: CoNLL-U (parsing), or JSON lines"
    add("input", metavar="INPUT", type=FILE, help=reads)
    add("output", metavar="OUTPUT", type=output_file, help="file to write, - for standard output")
    add("--language", help="whose subnetwork to use; the full network if not given")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Read one file with a language's subnetwork, or with the full network."""
    from fastmask.training.engine import device_of
    from fastmask.training.run_folder import load_run

    check_writable(options.output)
    loaded = load_run(options.run)
    task = loaded.task
    task.model.to(device_of(options.device))
    with task.reading(options.language):
        count = task.predict_file(options.input, options.output)
    print(f"{count} {task.example_word} written to {options.output}", file=stream_beside(options.output))
