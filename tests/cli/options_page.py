"""The tables of options in docs/cli.md, made from the parsers: `python tests/cli/options_page.py` writes them anew.

A table stands between ``<!-- options: COMMAND -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser
from collections.abc import Iterable
from pathlib import Path

from fastmask.cli import _parser
from fastmask.tasks import TASKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = "\n| option | default | meaning |\n|---|---|---|\n"
TABLES = re.compile(r"(?<=<!-- options: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
OF_ALL = ("help", "debug")


def parser_of(command: str, *arguments: str) -> ArgumentParser:
    """The parser of one command, with the options of what its arguments name."""
    commands = next(action for action in _parser([command, *arguments])._actions if action.dest == "command")
    assert commands.choices is not None
    return commands.choices[command]


def tables_of(command: str) -> str:
    """The options of a command by group, or of every task ("tasks"), as Markdown."""
    if command == "tasks":
        return "".join(tables(parser_of("train", "--task", name), [f"task {name}"]) for name in TASKS)
    parser, train = parser_of(command), parser_of("train")
    titles = [str(group.title) for group in parser._action_groups if not str(group.title).startswith("task ")]
    if command != "compare":
        return tables(parser, titles)
    # A comparison has nearly all settings of a run, which need not be said twice.
    mine = {action.dest for action in parser._actions}
    known = [action.dest for action in train._actions if action.dest.startswith("setting:")]
    others = ", ".join(f"`--{dest.removeprefix('setting:').replace('_', '-')}`" for dest in known if dest not in mine)
    return f"{tables(parser, titles, known)}\nAlso the options of `train`, except {others}.\n"


def tables(parser: ArgumentParser, titles: Iterable[str], without: Iterable[str] = ()) -> str:
    """The groups of a parser with these titles, without the options of some destinations."""
    rows: dict[str, str] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("positional arguments", "options") else f"\n**{group.title}**\n"
        for action in group._group_actions if group.title in titles else ():
            if action.dest not in (*OF_ALL, *without):
                rows[title] = rows.get(title, HEAD) + row(parser, action)
    return "".join(title + table for title, table in rows.items())


def row(parser: ArgumentParser, action: Action) -> str:
    """One option, as its help says it."""
    said: str = parser._get_formatter()._expand_help(action)
    found = re.fullmatch(r"(.*?)(?: \(default: (.*)\)|; ([^;]*) if not given)?", said)
    assert found is not None
    meaning, *defaults = found.groups()
    default = "required" if action.required else defaults[0] or defaults[1] or ""
    names = ", ".join(f"`{name}`" for name in action.option_strings or [str(action.metavar)])
    choices = f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}" if action.choices else ""
    return f"| {names} | {default} | {meaning}{choices} |\n"


def page() -> str:
    """The page with the tables as they should be."""
    return TABLES.sub(lambda found: f"{found[1]}{found[2]}{tables_of(found[1])}\n", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
