"""What a command reads: it must be there before anything is loaded, and what is missing is said in one way."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastmask.errors import nearest

__all__ = ["DATA", "FILE", "MASKS", "MODEL", "RUN", "Input", "check_inputs"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Input:
    """The `type` of an option that names something to read; ``-`` is standard input where only a file will do.

    Attributes:
        expected: what it is, for the message.
        file: whether it may be a file.
        folder: whether it may be a folder.
        hub: whether it may be a name on the Hub, which is looked up when it is loaded.
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
            kinds = " or ".join(["folder"] * self.folder + ["file"] * self.file)
            problem = f"there is no such {kinds} (expected {self.expected}){_nearest_to(path)}"
            raise FileNotFoundError(f"{option} is {given}: {problem}")
        if not (self.folder if is_folder else self.file):
            problem = f"that is a {'folder' if is_folder else 'file'} (expected {self.expected})"
        elif not os.access(path, os.R_OK):
            problem = f"you may not read it (expected {self.expected})"
        else:
            return
        raise ValueError(f"{option} is {given}: {problem}")


FILE = Input("a file", file=True)
RUN = Input("the folder of a finished run", folder=True)
MASKS = Input("a file of subnetworks, or the folder of a run that has one", file=True, folder=True)
MODEL = Input("a folder or a name on the Hub", folder=True, hub=True)
DATA = Input("a folder, a file or a name on the Hub", file=True, folder=True, hub=True)


def check_inputs(options: argparse.Namespace) -> None:
    """See that everything is there that was given to an option of `options.parser` which is an `Input`.

    Raises:
        FileNotFoundError, ValueError: see `Input.check`; the first option that is wrong.
    """
    for action in options.parser._actions:
        given = getattr(options, action.dest, None)
        if isinstance(action.type, Input) and given is not None:
            option = action.option_strings[0] if action.option_strings else str(action.metavar)
            for each in given if isinstance(given, list) else [given]:
                action.type.check(option, each)


def _nearest_to(path: Path) -> str:
    """What a path that is not there may have meant: an entry of the first folder on its way that is there."""
    while not os.path.isdir(path.parent):
        path = path.parent
    close = nearest(path.name, sorted(os.listdir(path.parent)), 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
