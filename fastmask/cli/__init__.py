"""The `fastmask` command: `main`, and where its commands are."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from fastmask.errors import nearest

__all__ = ["main"]

# Command -> the module of this folder that has `add_COMMAND`, its options, and `run_COMMAND`; and what it does.
COMMANDS = {
    "train": ("train", "train a multilingual model with one subnetwork per language"),
    "discover": ("discover", "find one subnetwork per language by iterative pruning"),
    "evaluate": ("finished", "score a run: the full network beside the subnetworks"),
    "predict": ("finished", "annotate a file with the model of a run"),
    "compare": ("compare", "compare methods, with and without meta-learning, on seen and unseen languages over seeds"),
    "adapt": ("adapt", "adapt a run to an unseen language with a few sentences, and save it as a new run"),
    "analyze": ("finished", "report what each method did to the model, as a page of tables and figures"),
    "masks": ("discover", "show what a file of subnetworks holds"),
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help text, where there is one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:  # but not 0
            return action.help
        return super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted, 141
    when the reader of what it writes has gone.

    A failure prints one message and no traceback unless `--debug` is given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = f"fastmask {arguments[0]}" if arguments else "fastmask"
    code = 2  # of a failure, until the options are understood

    def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category is UserWarning:  # those of other libraries are kept out, and so is the source line
            print(f"{name}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            options, rest = _parser(arguments).parse_known_args(arguments)
            if rest:
                options.parser.error(_not_understood(rest[0], options.parser))
            code = 1
            options.command_line = shlex.join(["fastmask", *arguments])
            options.check(options)
            options.do(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read what was written, such as `head`, has had enough. Nothing is left to be flushed at the exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and _is_of_an_extra(error):
            extra = "the command needs the extra `train` (in a checkout: pip install -e '.[train]')"
            print(f"{name}: error: {error.name} is not installed: {extra}", file=sys.stderr)
            return 1
        if "--debug" in arguments:
            raise
        expected = isinstance(error, (ValueError, KeyError, OSError, RuntimeError, ImportError))
        print(f"{name}: {'error' if expected else f'unexpected {type(error).__name__}'}: {error}", file=sys.stderr)
        if not expected:
            print("this is a bug; run again with --debug for the traceback", file=sys.stderr)
        return code
    return 0


def _is_of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether it is a module of ours that imports what is missing, and not one of the user's task."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    by = next((name for name in reversed(names) if not name.startswith(("importlib", "__main__"))), "")
    return by.startswith("fastmask") and not (error.name or "fastmask").startswith("fastmask")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line, with the options of the command that `arguments` name.

    The options of a command stand in its module, which may load PyTorch: general help does not wait for it.
    """
    import fastmask

    about = "Per-language subnetworks of one shared model."
    parser = argparse.ArgumentParser(prog="fastmask", description=about, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"fastmask {fastmask.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help, formatter_class=_Formatter)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in arguments[:1]:
            found = importlib.import_module(f"fastmask.cli.{module}")
            getattr(found, f"add_{name}")(command, arguments)
            check = importlib.import_module("fastmask.cli.options").check_inputs
            command.set_defaults(parser=command, check=check, do=getattr(found, f"run_{name}"))
    return parser


def _not_understood(given: str, parser: argparse.ArgumentParser) -> str:
    """What is wrong with an argument that a command has no place for; argparse names no option near to it."""
    name = given.partition("=")[0]
    close = nearest(name, parser._option_string_actions, 1) if name.startswith("-") else []
    return f"unrecognized argument: {given}{f' (did you mean {close[0]}?)' if close else ''}"
