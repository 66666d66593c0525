"""Command-line options made from the fields of settings, and merged with a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from fastmask.training.config import TrainConfig

__all__ = ["STANDARD_OUTPUT", "add_settings", "given_settings", "output_file"]

STANDARD_OUTPUT = "/dev/stdout"


def output_file(name: str) -> str:
    """What an option that names a file to write stands for: ``-`` is standard output."""
    return STANDARD_OUTPUT if name == "-" else name


def add_settings(
    parser: argparse._ActionsContainer,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    settings: type[Any] = TrainConfig,
) -> None:
    """Add an option for every field of `settings`, or for some; what is not given stays out of the namespace."""
    hints = get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if item.name in without or (only is not None and item.name not in only):
            continue
        kinds = [kind for kind in get_args(hints[item.name]) if kind is not type(None)] or [hints[item.name]]
        default = "" if item.default is None else f" (default: {item.default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": item.metadata["help"] + default}
        if kinds[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kinds[0]
            options["choices"] = None if item.metadata.get("list") else item.metadata.get("choices")
            if options["choices"] is None:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kinds[0]]
        parser.add_argument(f"--{item.name.replace('_', '-')}", dest=f"setting:{item.name}", **options)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {
        name.removeprefix("setting:"): value for name, value in vars(options).items() if name.startswith("setting:")
    }
