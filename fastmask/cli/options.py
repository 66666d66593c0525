"""Command-line options made from the fields of settings, and merged with a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from fastmask.cli.inputs import DATA, MASKS, MODEL
from fastmask.files import STDOUT, read_yaml
from fastmask.training.config import DEVICES, TrainConfig

__all__ = [
    "Joined", "add_data", "add_device", "add_settings", "add_task_settings", "given_settings", "output_file",
]  # fmt: skip

SETTING, OPTION = "setting:", "option:"  # begin the names of settings in a namespace
INPUTS = {"data": DATA, "masks": MASKS, "model": MODEL}  # settings that name what is read


def output_file(name: str) -> str:
    """What an option that names a file to write stands for: ``-`` is standard output."""
    return STDOUT if name == "-" else name


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that say on which data, and on what, a finished run is computed."""
    data = "a folder, a file or a name on the Hub; that of the run if not given"
    parser.add_argument("--data", type=DATA, help=data)
    parser.add_argument("--languages", nargs="+", help="codes or treebank names; those of the run if not given")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where to compute."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")


def add_settings(
    parser: argparse.ArgumentParser,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    settings: type[Any] = TrainConfig,
    prefix: str = SETTING,
    group: str | None = None,
    default: str | None = None,
) -> None:
    """Add an option for every field of `settings`, or for some; what is not given stays out of the namespace.

    Options stand in the groups that fields name, or all in `group`. Their help says `default`, or that of the field.
    """
    hints = get_type_hints(settings)
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        if item.name in without or item.name == "task_options" or (only is not None and item.name not in only):
            continue
        title = group or item.metadata.get("group")
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        kinds = [kind for kind in get_args(hints[item.name]) if kind is not type(None)] or [hints[item.name]]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(item, default)}
        if kinds[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = INPUTS.get(item.name, kinds[0])
            options["choices"] = None if item.metadata.get("list") else item.metadata.get("choices")
            if options["choices"] is None:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kinds[0]]
            if item.metadata.get("list"):
                options |= {"nargs": "+", "action": Joined}
        (groups[title] if title else parser).add_argument(
            f"--{item.name.replace('_', '-')}", dest=f"{prefix}{item.name}", **options
        )


def _help_of(item: dataclasses.Field[Any], default: str | None) -> str:
    """What an option says, with its default: `default`, or that of the field."""
    text: str = item.metadata["help"]
    if default is not None:
        text = re.sub("; [^;]* if not given$", "", text)
    elif isinstance(item.default, bool):
        default = "on" if item.default else "off"
    elif item.default not in (None, ""):
        default = str(item.default)
    return text if default is None else f"{text} (default: {default})"


def add_task_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the options of the task that `arguments` name (``--task``), by default those of parsing."""
    from fastmask.tasks.registry import task_class

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--config")
    known, _ = first.parse_known_args(list(arguments))
    name = known.task
    if name is None and known.config:
        with contextlib.suppress(Exception):  # what is wrong with the file is said when it is read
            name = read_yaml(known.config).get("task")
    name = TrainConfig.task if name is None else name
    add_settings(parser, settings=task_class(name).settings, prefix=OPTION, group=f"task {name}")


class Joined(argparse.Action):
    """A list, given as ``en,ar`` or as ``en ar``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, ",".join(values))


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line; those of the task under "task_options"."""
    given = {name: value for name, value in vars(options).items() if name.startswith((SETTING, OPTION))}
    found = {name.removeprefix(SETTING): value for name, value in given.items() if name.startswith(SETTING)}
    own = {name.removeprefix(OPTION): value for name, value in given.items() if name.startswith(OPTION)}
    return {**found, "task_options": own} if own else found
