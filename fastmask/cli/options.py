"""Options of the commands: what they read and write, and one for each field of settings, merged with a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from fastmask.errors import nearest
from fastmask.files import STDOUT, read_yaml
from fastmask.settings import ConfigError, items_of
from fastmask.subnetworks import Subnetworks
from fastmask.training.config import DEVICES, TrainConfig
from fastmask.training.run_folder import MASKS_FILE, data_of

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Input:
    """The `type` of an option that names something to read; ``-`` is standard input where only a file will do.

    `expected` says what it is, for messages. A name on the Hub (`hub`) is looked up when it is loaded.
    """

    expected: str
    file: bool = False
    folder: bool = False
    hub: bool = False

    def __call__(self, given: str) -> str:
        """The path that an argument stands for."""
        return "/dev/stdin" if given == "-" and not self.folder else given

    def check(self, option: str, given: str) -> None:
        """See that `given`, the value of `option`, is there and can be read.

        Raises:
            FileNotFoundError: it is not; the nearest name in its folder is given.
            ValueError: a folder in place of a file, or the other way round, or not readable.
        """
        path = Path(given).expanduser()
        is_folder = os.path.isdir(path)
        if not os.path.exists(path):
            if self.hub and _HUB_NAME.fullmatch(given):
                return
            while not os.path.isdir(path.parent):  # the first part of it that is not there
                path = path.parent
            close = nearest(path.name, sorted(os.listdir(path.parent)), 1)
            meant = f"; did you mean {path.parent / close[0]}?" if close else ""
            kinds = " or ".join(["folder"] * self.folder + ["file"] * self.file)
            raise FileNotFoundError(f"{option} is {given}: there is no such {kinds} (expected {self.expected}){meant}")
        if not (self.folder if is_folder else self.file):
            raise ValueError(
                f"{option} is {given}: that is a {'folder' if is_folder else 'file'} (expected {self.expected})"
            )
        if not os.access(path, os.R_OK):
            raise ValueError(f"{option} is {given}: you may not read it (expected {self.expected})")


FILE = Input("a file", file=True)
RUN = Input("the folder of a finished run", folder=True)
MASKS = Input("a file of subnetworks, or the folder of a run that has one", file=True, folder=True)
DATA = Input("a folder, a file or a name on the Hub", file=True, folder=True, hub=True)
_SETTINGS = {"data": DATA, "masks": MASKS, "model": Input("a folder or a name on the Hub", folder=True, hub=True)}


def check_inputs(options: argparse.Namespace) -> None:
    """See that everything is there that the options of a command name; raises what `Input.check` does."""
    for action in options.parser._actions:
        given = getattr(options, action.dest, None)
        if isinstance(action.type, Input) and given is not None:
            option = action.option_strings[0] if action.option_strings else str(action.metavar)
            for each in given if isinstance(given, list) else [given]:
                action.type.check(option, each)


def output_file(name: str) -> str:
    """What an option that names a file to write stands for: ``-`` is standard output."""
    return STDOUT if name == "-" else name


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that say on which data, and on what, a finished run is computed."""
    parser.add_argument("--data", type=DATA, help="a folder, a file or a name on the Hub; that of the run if not given")
    parser.add_argument("--languages", nargs="+", help="codes or treebank names; those of the run if not given")
    add_device(parser)


def which_data(config: TrainConfig, run: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The data and the languages to read: those that the options of `add_data` give, else those of the run."""
    given = items_of(",".join(options.languages or [])) or config.language_list
    masks = Path(run, MASKS_FILE)
    if options.data is not None and not given and masks.is_file():
        given = list(Subnetworks.load(masks).languages)
    if options.data is not None and given:
        return options.data, given
    data, languages, _ = data_of(config, run)
    return options.data or data, given or languages


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where to compute."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")


def add_settings(
    parser: argparse.ArgumentParser,
    settings: type[Any] = TrainConfig,
    only: Sequence[str] | None = None,
    group: str | None = None,
    default: str | None = None,
    prefix: str = "setting:",
) -> None:
    """Add an option for every field of `settings`, or for some; what is not given stays out of the namespace.

    Options stand in the groups that fields name, or all in `group`. Their help says `default`, or that of the field.
    Their names in the namespace begin with `prefix`.
    """
    hints = get_type_hints(settings)
    groups: dict[str | None, Any] = {None: parser}
    for item in dataclasses.fields(settings):
        if item.name == "task_options" or (only is not None and item.name not in only):
            continue
        title = group or item.metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = next(kind for kind in get_args(hints[item.name]) or [hints[item.name]] if kind is not NoneType)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(item, default)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _SETTINGS.get(item.name, kind)
            options["nargs"] = "+" if item.metadata.get("list") else None
            options["choices"] = item.metadata.get("choices")
            if options["choices"] is None:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        groups[title].add_argument(f"--{item.name.replace('_', '-')}", dest=f"{prefix}{item.name}", **options)


def _help_of(item: dataclasses.Field[Any], default: str | None) -> str:
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
    from fastmask.tasks import task_class

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--config")
    known, _ = first.parse_known_args(list(arguments))
    name = known.task
    if name is None and known.config:
        with contextlib.suppress(Exception):  # what is wrong with the file is said when it is read
            name = read_yaml(known.config).get("task")
    name = TrainConfig.task if name is None else name
    add_settings(parser, task_class(name).settings, group=f"task {name}", prefix="option:")


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line; those of the task under "task_options"."""
    given: dict[str, dict[str, Any]] = {"setting": {}, "option": {}}
    for name, value in vars(options).items():
        kind, _, own = name.partition(":")
        if kind in given:
            given[kind][own] = value
    if "tau" in given["setting"]:
        if "density" in given["setting"]:
            raise ConfigError("--tau and --density are both given (expected one: a density is kept whatever tau is)")
        given["setting"]["density"] = None  # else that of a file or of a run would count
    return {**given["setting"], "task_options": given["option"]} if given["option"] else given["setting"]
