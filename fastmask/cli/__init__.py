"""The `fastmask` command. Each of `COMMANDS` is a module of this folder with `add_options` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from fastmask.cli.inputs import check_inputs
from fastmask.errors import nearest

__all__ = ["main"]

COMMANDS = {
    "train": "train a multilingual model with one subnetwork for each language",
    "discover": "find one subnetwork for each language by iterative pruning",
    "evaluate": "scores of a run, full network beside subnetworks",
    "predict": "read a file with a run's model and write it with predictions",
    "compare": "compare methods, with and without meta-learning, over seeds, on seen and unseen languages",
    "adapt": "adapt a run to an unseen language, from a handful of sentences, and save it as another run",
    "analyze": "what each method did to the model: a page of tables and pictures, from finished runs",
    "masks": "show what is in a file of subnetworks",
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
    # A command's options stand in its module, which may load PyTorch: help in general does not wait for it.
    try:
        parser = _parser(arguments) if arguments and arguments[0] in COMMANDS else _commands()[0]
    except ModuleNotFoundError as error:
        return _missing(error, arguments[0])
    except (ValueError, KeyError, OSError) as error:  # a task that is not there
        print(f"fastmask {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    options, rest = parser.parse_known_args(arguments)
    if rest:
        options.parser.error(_not_understood(rest[0], options.parser))
    options.command_line = shlex.join(["fastmask", *arguments])
    try:
        with warnings.catch_warnings():
            _print_warnings_plainly(options.command)
            check_inputs(options)
            importlib.import_module(f"fastmask.cli.{options.command}").run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read what was written, such as `head`, has had enough. Nothing is left to be flushed at the exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return _missing(error, options.command)
    except Exception as error:
        if options.debug:
            raise
        expected = isinstance(error, (ValueError, KeyError, OSError, RuntimeError, ImportError))
        what = "error" if expected else f"unexpected {type(error).__name__}"
        print(f"fastmask {options.command}: {what}: {error}", file=sys.stderr)
        if not expected:
            print("this is a bug; run again with --debug for the traceback", file=sys.stderr)
        return 1
    return 0


def _not_understood(given: str, parser: argparse.ArgumentParser) -> str:
    """What is wrong with an argument that a command has no place for; argparse names no option near to it."""
    name = given.partition("=")[0]
    close = nearest(name, parser._option_string_actions, 1) if name.startswith("-") else []
    return f"unrecognized argument: {given}{f' (did you mean {close[0]}?)' if close else ''}"


def _missing(error: ModuleNotFoundError, command: str) -> int:
    if (error.name or "fastmask").startswith("fastmask"):
        raise error
    what = "the command needs the extra `train` (in a checkout: pip install -e '.[train]')"
    print(f"fastmask {command}: error: {error.name} is not installed: {what}", file=sys.stderr)
    return 1


def _print_warnings_plainly(command: str) -> None:
    """Show a warning as one line, without the source line that gave it; those of other libraries are kept out."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category is UserWarning:
            print(f"fastmask {command}: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def _commands() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of its commands, which have no options yet."""
    import fastmask

    parser = argparse.ArgumentParser(
        prog="fastmask", description="Per-language subnetworks of one shared model.", formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"fastmask {fastmask.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found = {}
    for name, help in COMMANDS.items():
        found[name] = commands.add_parser(name, help=help, description=help, formatter_class=_Formatter)
        found[name].add_argument("--debug", action="store_true", help="show the traceback of an error")
        found[name].set_defaults(parser=found[name])
    return parser, found


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line with the options of the command that `arguments` name."""
    parser, commands = _commands()
    importlib.import_module(f"fastmask.cli.{arguments[0]}").add_options(commands[arguments[0]], arguments)
    return parser
