"""``report.html`` and the files beside it: whole, self-contained, replaced, and nothing else touched."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pandas as pd
import pytest

import fastmask as fm
from fastmask.analysis import result as results
from fastmask.analysis.drawing import LANGUAGE_FAMILIES, family_colour, new_figure
from fastmask.analysis.result import Result
from fastmask.reports import make_report
from fastmask.reports.page import ROOM, SHOWN_ROWS, Part, Skipped, file_name, render
from fastmask.reports.runs import Options, studies_of

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Every tag is closed where it should be; keeps what the page loads and links to, its ids and its texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.links, self.ids, self.images, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "srcset", "data", "poster", "action")]
        if tag == "link":
            self.loaded.append(given.get("href"))
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if "id" in given:
            self.ids.append(given["id"])

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(static_run, tmp_path_factory):
    """The folder of a report."""
    out = tmp_path_factory.mktemp("report") / "out"
    return make_report([static_run], ["overlap", "use"], out, command="fastmask analyze <x>").report.parent


def test_page_is_whole_and_loads_nothing(report):
    """The page is valid HTML, loads nothing from the network, and its links lead somewhere."""
    text = (report / "report.html").read_text()
    found = Page(text)
    assert found.images
    for image in found.images:
        head, _, content = image["src"].partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(content)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"currentColor" in svg
        assert b"#000000" not in svg
        assert 100 < int(image["width"]) < 3000
        assert len(image["alt"]) > 20
    assert all(value.startswith("data:") for value in found.loaded)
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.[a-z]", text)
    assert len(found.ids) == len(set(found.ids))
    assert all(link[1:] in found.ids for link in found.links)  # none to a file: the page may be alone
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_page_says_what_was_computed(report, static_run):
    """The page names the runs, the versions and the command that makes it again."""
    text = " ".join(Page((report / "report.html").read_text()).texts)
    for wanted in ("static", str(static_run.resolve()), "density: 0.5", f"fastmask {fm.__version__}", "Skipped"):
        assert wanted in text, wanted
    assert "fastmask analyze <x>" in text  # escaped in the file, or the parser would have seen a tag
    study = studies_of([static_run])[0]
    for units in ("heads", "neurons"):
        result = fm.analysis.overlap(study.runs[0].masks, units=units)
        assert result.caption in text
    assert "n = " in text or "languages own" in text


def test_files_are_listed_and_there(report):
    """Every table and picture lies beside the page and is listed on it."""
    contents = json.loads((report / "contents.json").read_text())
    assert sorted(path.name for path in report.iterdir()) == sorted([*contents, "contents.json"])
    for name in ("overlap-heads-static", "overlap-neurons-static", "use-heads-static-seed-0"):
        for ending in ("csv", "png", "svg"):
            assert f"{name}.{ending}" in contents
    assert (report / "overlap-heads-static.svg").read_text().rstrip().endswith("</svg>")


def page_of(study, *results):
    """A page of some results, and their sections."""
    part = Part(study, "overlap")
    for number, result in enumerate(results):
        part.add("<i>title</i>", result, f"x{number}")
    part.draw()
    return render([study], [part], [Skipped("a", "<u>", "because & so")], "a <b>"), part.sections


def test_hostile_names_and_long_tables(static_run):
    """Names of languages and folders are escaped, and long tables are cut short on the page."""
    masks = fm.Subnetworks.load(static_run / "masks.safetensors")
    (study,) = studies_of([static_run])
    for n in (SHOWN_ROWS, SHOWN_ROWS + 1):
        rows = {"language": ["<script>alert(1)</script>"] * n, "a_b": [float("nan"), *[0.123456] * (n - 1)]}
        draw = fm.analysis.overlap(masks).figure
        text, (section,) = page_of(study, Result("overlap", pd.DataFrame(rows), "<b>caption</b> & more", draw))
        found = Page(text)
        assert "<script" not in text
        assert "<b>" not in text
        assert "<u>" not in text
        shown = sum("alert(1)" in data for data in found.texts)
        assert shown == (n if n == SHOWN_ROWS else 0)
        assert (f"{section.result.name}.csv, beside this page: {n} rows" in " ".join(found.texts)) == (n > SHOWN_ROWS)
        assert ("0.1235" in found.texts) == ("–" in found.texts) == (n == SHOWN_ROWS)
        assert len(pd.read_csv(io.BytesIO(section.result.files({})[f"{section.result.name}.csv"]))) == n


def test_p_values_are_corrected_over_the_page(static_run):
    """What the page calls significant is so after Holm's correction over all its tables."""
    (study,) = studies_of([static_run])
    more = {"more": pd.DataFrame({"p": [0.5]})}
    results = [
        Result("overlap", pd.DataFrame({"p": of_one}), "", lambda: new_figure(1, 1), more)
        for of_one in ([0.001, 0.04], [0.02, float("nan")])
    ]
    tables = re.findall(r"<table>.*?</table>", page_of(study, *results)[0], re.DOTALL)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", table) for table in tables]
    # Holm over 0.001, 0.02, 0.04, 0.5, 0.5: times 5, 4, 3, 2, 1.
    assert ["0.5", "1"] in found
    assert ["0.001", "0.005", "0.04", "0.12"] in found
    assert ["0.02", "0.08", "–", "–"] in found


def test_results_come_first(comparison, tmp_path):
    """The page begins with what each method does, and does not call noise a result."""
    made = make_report([comparison], ["effect"], tmp_path / "out")
    text = made.report.read_text()
    assert text.index('id="results"') < text.index("Effect of each method</h2>")
    table = re.search(r'aria-label="results".*?</table>', text, re.DOTALL)[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", table)]
    assert [row[:3] for row in rows] == [["static", "full", on] for on in ("seen", "adapted", "zero-shot")]
    assert {row[-1] for row in rows} == {"too few"}
    assert "3 are “too few”" in " ".join(text.split())


def test_the_page_stays_small(static_run, monkeypatch):
    """The page of a large comparison is small enough to send, and says which pictures it leaves out."""
    (study,) = studies_of([static_run])
    results = [fm.analysis.overlap(study.runs[0].masks, units=units) for units in ("heads", "neurons")]
    whole = Page(page_of(study, *results)[0])
    assert len(whole.images) == 2
    monkeypatch.setattr("fastmask.reports.page.ROOM", len(whole.images[0]["src"]))
    text, _ = page_of(study, *results)
    assert len(Page(text).images) == 1
    assert text.count("had no room here") == 1
    assert ROOM < 1_300_000


def test_pictures_keep_what_they_say(static_run):
    """Numbers and names in the embedded picture are those of the file."""
    (study,) = studies_of([static_run])
    words = ["p = 0.60938", 'x id="a_1"', "#000000", "font-family: 'DejaVu Sans'; "]

    def draw():
        figure = new_figure(4, 2)
        for at, word in enumerate(words):
            figure.text(0.1, 0.2 * at, word)
        return figure

    text, _ = page_of(study, Result("overlap", pd.DataFrame(), "", draw))
    svg = base64.b64decode(Page(text).images[0]["src"].partition(",")[2])
    assert [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")] == words


def test_families_have_one_colour(static_run):
    """A language family has one colour in all pictures."""
    colours = {family: family_colour(family, "") for family in set(LANGUAGE_FAMILIES.values())}
    assert len(set(colours.values())) == len(colours)
    (study,) = studies_of([static_run])
    text, (section,) = page_of(study, fm.analysis.overlap(study.runs[0].masks))
    svg = section.pictures["svg"].decode()
    for language in study.languages:
        colour = colours[LANGUAGE_FAMILIES[language]]
        assert re.search(rf'<text style="[^"]*fill: {colour}[^"]*"[^>]*>{language}</text>', svg), language
        assert f'style="color: {colour}"' in text


def test_same_input_same_files(report, static_run, tmp_path):
    """The same input makes the same files, byte for byte."""
    make_report([static_run], ["overlap", "use"], tmp_path / "again", command="fastmask analyze <x>")
    for path in report.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_second_report_replaces_the_first(static_run, tmp_path):
    """A new report removes the files of the old one, and nobody else's."""
    out = tmp_path / "out"
    make_report([static_run], ["overlap", "use"], out)
    (out / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in static_run.rglob("*")}
    make_report([static_run], ["use"], out)
    names = {path.name for path in out.iterdir()}
    assert not any(name.startswith("overlap") for name in names)
    assert {"report.html", "notes.txt", "use-heads-static-seed-0.png"} <= names
    assert not any(name.startswith(".") for name in names)
    assert {path: path.stat().st_mtime_ns for path in static_run.rglob("*")} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds no report"):
        make_report([static_run], ["overlap"], tmp_path / "other")


def test_an_interrupted_report_leaves_whole_files(static_run, tmp_path, monkeypatch):
    """Ctrl-C leaves whole files only, and the next report removes them."""
    out = tmp_path / "out"
    make_report([static_run], ["overlap"], out)
    old, write, count = (out / "report.html").read_bytes(), results.replace_file, itertools.count()

    def write_some(path, writer):
        if next(count) == 4:
            raise KeyboardInterrupt
        write(path, writer)

    with monkeypatch.context() as patched:
        patched.setattr(results, "replace_file", write_some)
        with pytest.raises(KeyboardInterrupt):
            make_report([static_run], ["use"], out)
    assert (out / "report.html").read_bytes() == old
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    make_report([static_run], ["dynamics", "overlap"], out)
    assert not list(out.glob("use-*"))


def test_several_studies_keep_their_files_apart(static_run, comparison, tmp_path):
    """Two comparisons in one report have files of their own."""
    made = make_report([static_run, comparison], ["overlap"], tmp_path / "out")
    names = {path.name for path in made.report.parent.glob("overlap*.png")} | {
        path.name for path in made.report.parent.glob("?-*-overlap-*.png")
    }
    assert len(names) == made.sections == 4
    found = Page(made.report.read_text())
    assert len(found.ids) == len(set(found.ids))
    assert all(link[1:] in found.ids for link in found.links)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the font lacks some of the letters, the picture room for others
def test_hostile_folders(static_run, tmp_path):
    """A folder's name is plain text to page and pictures, and no two folders share a file."""
    names = ["[b] <x>|", "-b---x", "日本", "語"]
    without = shutil.ignore_patterns("checkpoints")  # else the most of the work is on these
    runs = [shutil.copytree(static_run, tmp_path / name, ignore=without) for name in names]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = tmp_path / "out"
    made = make_report(runs, ["overlap", "conflict"], out, Options(sentences=2, strict=True))
    assert all("one seed" in reason.why or "kept no checkpoint" in reason.why for reason in made.skipped)
    text = made.report.read_text()
    found = Page(text)
    assert len(found.images) == made.sections == len(list(out.glob("*.png")))
    assert len(found.ids) == len(set(found.ids))
    assert all(link[1:] in found.ids for link in found.links)
    for picture in out.glob("*.svg"):
        ElementTree.parse(picture)
    words = " ".join(found.texts)
    for name in (names[0], names[2], names[3]):
        assert f"static ({name})" in words, name
    assert "<x>" not in text
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if out not in (path, *path.parents)}
    assert changed == before


def test_file_names():
    """A variant's name becomes a file name that every system accepts."""
    assert file_name("conflict", "static + FOMAML (my run/2)") == "conflict-static-fomaml-my-run-2"
    assert file_name("conflict", "../..", "日本", "..up", "x" * 300) == f"conflict-up-{'x' * 60}"
