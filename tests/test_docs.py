"""The documentation is true: its Python runs, its commands exist, its links lead somewhere, and no name is left out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template

import pytest

import fastmask as fm
from benchmarks.row import Setting
from benchmarks.row import read as read_rows
from fastmask.cli import _parser, main
from fastmask.models import families
from tests.cli import options_page
from tests.compare.tiny_encoder import tiny_encoder

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
NOT_RUN = {"tools.md", "tasks.md"}  # parts of longer programs, which tests/models and tests/tasks run whole


def blocks(page: Path, kind: str) -> list[str]:
    """The blocks of code of a kind, in order."""
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == kind]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.name not in NOT_RUN], ids=named
)
def test_python_runs(page, tmp_path, monkeypatch):
    """The Python of a page runs from top to bottom, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_registered", {})  # what a page registers is for that page
    names: dict[str, object] = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{named(page)}, block {number}", "exec"), names)


@pytest.mark.parametrize(("page", "task"), [("quickstart.md", "classification"), ("tasks.md", "tagging")])
def test_lines_of_data_can_be_trained_on(page, task, tmp_path):
    """A page shows lines of JSON that the task reads."""
    (lines,) = blocks(DOCS / page, "json")
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    tiny_encoder(tmp_path / "encoder", lines)
    given = ["--task", task, "--data", tmp_path, "--model", tmp_path / "encoder", "--out", tmp_path / "run"]
    assert main([str(word) for word in ("train", *given, "--method", "full", "--steps", 2, "--threads", 1)]) == 0


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page's shell blocks; variables that a block sets are put in."""
    found = []
    for block in blocks(page, "bash"):
        known: dict[str, str] = {}
        for line in block.splitlines():
            words = shlex.split(Template(line).substitute(known), comments=True)
            if words and re.match(r"\w+=", words[0]):
                name, _, known[name] = words[0].partition("=")
            elif words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=named)
def test_commands_exist(page, monkeypatch):
    """Every command of a page has the options that the page gives it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # where tasks of one's own are
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "fastmask":
            try:
                _parser(words[1:]).parse_args(words[1:])
            except SystemExit:
                pytest.fail(shlex.join(words))
        elif words[0] == "make":
            assert words[1] in targets, shlex.join(words)
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]) is not None, shlex.join(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), shlex.join(words)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    """Every relative link leads to an existing file, and to a heading in it."""
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)}: {link}"
        if anchor:
            headings = HEADING.findall(target.read_text(encoding="utf-8"))
            known = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{named(page)}: {link}"


def test_every_public_name_has_a_page_and_an_example():
    """Every public name is in the reference, and in a snippet that runs."""
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    snippets = "\n".join(code for page in PAGES if page.name not in NOT_RUN for code in blocks(page, "python"))
    for name in fm.__all__:
        assert re.search(rf"^::: fastmask\.{name}$", reference, re.MULTILINE), name
        assert re.search(rf"\bfm\.{name}\b", snippets), name


def test_the_numbers_of_the_readme_are_those_that_were_measured():
    """The speeds in the README's table are those in the file of the last whole run."""
    rows = read_rows(ROOT / "benchmarks" / "results" / "quick.csv")
    table = (ROOT / "README.md").read_text().partition("<!-- benchmarks:begin -->")[2]
    for line, batch, present in (("one language, 8 x 128", 8, 1), ("8 languages in one batch, 16 x 128", 16, 8)):
        wanted = Setting("encoder", density=0.5, languages=8, present=present, batch=batch, threads=2)
        found = {row.implementation: row for row in rows if row.setting == wanted}
        ours, dense = found["fastmask"], found["dense"]
        cells = [cell.strip() for cell in next(row for row in table.splitlines() if line in row).split("|")]
        assert cells[2:6] == [
            str(ours.over_full),
            str(ours.over_dense),
            f"{ours.ideal:.2f}x",
            f"{ours.kept_mib / dense.kept_mib:.2f}x",
        ]
        assert ours.machine.processor in table


def test_the_speeds_on_another_processor_are_those_that_were_measured():
    """What the README and the page on benchmarks say in words of an Intel Xeon is what its file says."""
    rows = [row for row in read_rows(ROOT / "benchmarks" / "results" / "quick-xeon.csv") if row.over_full is not None]
    one, mixed = ({row.implementation: row for row in rows if row.setting.present == n} for n in (1, 8))
    ours = " and ".join(f"{found['fastmask'].over_full.middle:.2f}x" for found in (one, mixed))
    for page in ("README.md", "docs/benchmarks.md"):
        text = (ROOT / page).read_text()
        assert ours in text
        assert f"{mixed['packed'].over_full.middle:.2f}x" in text


def test_the_page_of_the_command_line_has_the_options_of_the_parsers():
    """`python tests/cli/options_page.py` writes its tables anew: every option with its default and its meaning."""
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds(tmp_path):
    """`make docs` gives no warning."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
