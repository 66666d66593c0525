"""`fastmask masks`: what is in a file of subnetworks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from rich.table import Table

from fastmask.cli.inputs import MASKS
from fastmask.cli.report import console_of
from fastmask.files import read_metadata
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.storage import masks_file

__all__ = ["add_options", "print_masks", "run"]


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("file", metavar="FILE", type=MASKS, help="file that `train` or `discover` wrote, or the folder of a run")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    print_masks(Subnetworks.load(options.file), sys.stdout)
    if made_from := read_metadata(masks_file(options.file)).get("made_from"):
        print(f"made from {made_from}")


def print_masks(subnets: Subnetworks, file: TextIO) -> None:
    """A row for each language: units kept, live heads of each layer, and its most similar other language."""
    table = Table(title=f"subnetworks of {len(subnets.languages)} languages")
    table.add_column("language")
    named = (("heads", subnets.heads), ("neurons", subnets.neurons))
    kinds = [(kind, keep) for kind, keep in named if keep is not None]
    for kind, keep in kinds:
        table.add_column(f"{kind} of {keep[0].numel()}", justify="right")
        table.add_column(f"{kind} by layer", justify="left")
    for name in subnets.weights or {}:
        table.add_column(f"% of {name}", justify="right")
    several = len(subnets.languages) > 1
    if several:
        table.add_column("nearest (Jaccard)")
        overlap = subnets.overlap().fill_diagonal_(-1)
    for index, language in enumerate(subnets.languages):
        cells = [language]
        for _, keep in kinds:
            cells += [str(int(keep[index].sum())), " ".join(str(n) for n in keep[index].sum(-1).tolist())]
        cells += [f"{keep[index].float().mean() * 100:.1f}" for keep in (subnets.weights or {}).values()]
        if several:
            nearest = int(overlap[index].argmax())
            cells.append(f"{subnets.languages[nearest]} {overlap[index, nearest]:.2f}")
        table.add_row(*cells)
    console_of(file).print(table)
