"""The `fastmask` command: train, discover, evaluate, predict, compare, adapt, analyze, masks."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from fastmask.literal import say

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
        if action.default in (None, argparse.SUPPRESS, False):
            return action.help
        return super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted, 141
    when the reader of what it writes has gone.

    A failure prints one message and no traceback unless `--debug` is given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The options of commands are known where PyTorch is: who asks for help in general does not wait for it.
    try:
        parser = _parser(arguments) if arguments and arguments[0] in COMMANDS else _commands()[0]
    except ModuleNotFoundError as error:
        return _missing(error, arguments[0])
    except (ValueError, KeyError, OSError) as error:  # a task that is not there
        say(f"fastmask {arguments[0]}: error: {error}", sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(["fastmask", *arguments])
    try:
        with warnings.catch_warnings():
            _print_warnings_plainly(options.command)
            _run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read what was written, such as `head`, has had enough. Nothing is left to be flushed at the exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        say(f"interrupted{f': {error}' if str(error) else ''}", sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return _missing(error, options.command)
    except Exception as error:
        if options.debug:
            raise
        expected = isinstance(error, (ValueError, KeyError, OSError, RuntimeError, ImportError))
        what = "error" if expected else f"unexpected {type(error).__name__}"
        say(f"fastmask {options.command}: {what}: {error}", sys.stderr)
        if not expected:
            print("this is a bug; run again with --debug for the traceback", file=sys.stderr)
        return 1
    return 0


def _missing(error: ModuleNotFoundError, command: str) -> int:
    if (error.name or "fastmask").startswith("fastmask"):
        raise error
    what = "the command needs the extra `train` (in a checkout: pip install -e '.[train]')"
    say(f"fastmask {command}: error: {error.name} is not installed: {what}", sys.stderr)
    return 1


def _print_warnings_plainly(command: str) -> None:
    """Show a warning as one line, without the source line that gave it; those of other libraries are kept out."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category is UserWarning:
            say(f"fastmask {command}: warning: {message}", sys.stderr)

    warnings.showwarning = show


def _run(options: argparse.Namespace) -> None:
    # Each command imports what it needs when it runs: `--help` answers at once.
    importlib.import_module(f"fastmask.cli.{options.command}").run(options)


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
    return parser, found


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from fastmask.cli import analyze
    from fastmask.cli.adapt import add_options
    from fastmask.cli.options import Joined, add_settings, add_task_settings, output_file
    from fastmask.compare.plan import RESERVED, CompareConfig
    from fastmask.discovery import VOTES
    from fastmask.training.config import DEVICES, METAS, METHODS

    parser, commands = _commands()
    command = commands.__getitem__

    def data_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data", help="a folder, a file or a name on the Hub; that of the run if not given")
        sub.add_argument("--languages", nargs="+", help="codes or treebank names; those of the run if not given")
        sub.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")

    train = command("train")
    train.add_argument("--config", metavar="FILE", help="YAML file of settings; options given here override it")
    add_settings(train)
    if arguments[0] == "train":
        add_task_settings(train, arguments)

    find = command("discover")
    find.add_argument(
        "runs", nargs="+", metavar="RUN", help="finished runs of one encoder, on the same languages or others"
    )
    masks = "where to write the subnetworks (-: standard output)"
    find.add_argument("--masks", metavar="FILE", type=output_file, default="masks.safetensors", help=masks)
    find.add_argument(
        "--combine",
        choices=tuple(VOTES),
        default="majority",
        help="vote of the draws; with a density, the units with the most votes are kept, whatever this is",
    )
    add_settings(find, only=("score", "units", "density", "tau", "score_sentences", "draws", "dev_sentences", "seed"))
    data_options(find)

    score = command("evaluate")
    score.add_argument("run", metavar="RUN", help="folder of a finished run")
    score.add_argument("--split", default="test", choices=("train", "dev", "test"), help="which part of the data")
    scores = "also write the scores to this file (-: standard output)"
    score.add_argument("--json", metavar="FILE", type=output_file, help=scores)
    data_options(score)

    write = command("predict")
    write.add_argument("run", metavar="RUN", help="folder of a finished run")
    reads = "file to read, - for standard input: CoNLL-U (parsing), or JSON lines"
    write.add_argument("input", metavar="INPUT", help=reads)
    write.add_argument("output", metavar="OUTPUT", help="file to write, - for standard output")
    write.add_argument("--language", help="whose subnetwork to use; the full network if not given")
    write.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")

    grid = command("compare")
    grid.add_argument("--data", required=True, help="a folder, a file or a name on the Hub")
    grid.add_argument(
        "--out", required=True, help="folder of the comparison; the same command resumes where it stopped"
    )
    clusters = "address of a Ray cluster to train cells on instead (auto, local, host:port; needs the extra ray)"
    grid.add_argument("--ray", metavar="ADDRESS", help=clusters)
    plan = "YAML file that says everything: arms, settings, hypotheses (as compare.yaml of a comparison)"
    grid.add_argument("--plan", metavar="FILE", help=plan)
    methods = f"which subnetworks to compare, out of {', '.join(METHODS)} (default: all but vector)"
    grid.add_argument("--methods", nargs="+", action=Joined, help=methods)
    metas = f"with which meta-learning, out of {', '.join(METAS)} (default: none fomaml)"
    grid.add_argument("--metas", nargs="+", action=Joined, help=metas)
    some = "only these arms now, as in full,static; their tables are shown, and the others can follow"
    grid.add_argument("--arms", nargs="+", action=Joined, help=some)
    grid.add_argument("--workers", type=int, default=1, help="processes on this machine that train cells side by side")
    add_settings(grid, settings=CompareConfig, group="the comparison")
    add_settings(grid, without=RESERVED)
    if arguments[0] == "compare":
        add_task_settings(grid, arguments)

    learn = command("adapt")
    learn.add_argument("run", metavar="RUN", help="folder of a finished run")
    add_options(learn)
    learn.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")

    look = command("analyze")
    analyze.add_options(look)
    look.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")

    show = command("masks")
    show.add_argument("file", metavar="FILE", help="file that `train` or `discover` wrote, or the folder of a run")
    picture = "also draw head use by language and layer (.png, .svg, .pdf; -: PNG to standard output)"
    show.add_argument("--picture", metavar="FILE", type=output_file, help=picture)
    return parser
