"""``report.html``: one file that needs nothing beside it, made of a template with escaping on; and its parts."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers
from jinja2 import Environment, StrictUndefined

from fastmask.analysis.drawing import families_of, family_colour, language_colour
from fastmask.analysis.effects import verdict
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import holm, p_text
from fastmask.reports.runs import Options, SkipError, Study

EXPECTED = (ValueError, KeyError, OSError, RuntimeError, ImportError, ArithmeticError)
"""What goes wrong with a run or its data; any other error is a mistake in the code."""
SHOWN_ROWS = 40  # longer tables are in their CSV file only
ROOM = 1_200_000  # characters of pictures; those that find no room stand beside the page
THEME = (
    b"<style>:root{color:#1c1c1c;fill:currentColor}text{font-family:'DejaVu Sans','Verdana',sans-serif}"
    b"@media(prefers-color-scheme:dark){:root{color:#e6e6e6}}</style>"
)
NEEDLESS = re.compile(rb""" id="[a-z0-9]+_[0-9]+"| transform="rotate\(-0 [^"]*"|font-family: 'DejaVu[^;"]*;? ?""")
SHOWS = {
    "effect": ("Effect of each method", "What it does to each language's score, and what of that is inside the noise."),
    "overlap": ("Overlap of masks", "How much languages' subnetworks share, beside random masks of the same sizes."),
    "use": ("Use of heads and neurons", "How many languages own each of them, and how many all, one or none own."),
    "conflict": ("Gradient conflict", "Whether languages pull parameters one way, beside one language with itself."),
    "cross": ("Cross-evaluation", "How well each language does under every subnetwork; whether its own is the best."),
    "specificity": ("Specificity", "What each language loses without the units that are another one's own."),
    "typology": ("Typology", "Whether unseen languages gain more, the nearer they are to a training language."),
    "ablation": ("Ablation of single heads", "What a head is worth to each language; whether its score foresees it."),
    "dynamics": ("Dynamics of masks", "What changes in training, how far, whether related languages come together."),
}
"""Title of each analysis, and what it shows."""


class Skipped(NamedTuple):
    """What could not be done: the analysis, what of it ("" for all), and why."""

    analysis: str
    part: str
    why: str

    def __str__(self) -> str:
        return f"{self.analysis}{f' ({self.part})' if self.part else ''}: {self.why}"


@dataclass
class Section:
    """One analysis of something."""

    title: str
    result: Result  # its name is that of its files
    on_page: bool = True  # False for more of the same, such as another seed: its files stand beside the page
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # "png", "svg" -> content, once it is drawn


@dataclass
class Part:
    """What one analysis finds in one study."""

    study: Study
    analysis: str
    options: Options = field(default_factory=Options)
    stem: str = ""  # what the names of its files begin with
    taken: set[str] = field(default_factory=set)  # names of the whole report's files
    sections: list[Section] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, title: str, result: Result, *parts: str, note: str = "", on_page: bool = True) -> None:
        """Take a result; its files are named after the analysis and `parts`, and its caption ends with the note."""
        name = wanted = f"{self.stem}{file_name(result.name, *parts)}"
        number = 1
        while name in self.taken:
            number += 1
            name = f"{wanted}-{number}"
        self.taken.add(name)
        result = replace(result, name=name, caption=f"{result.caption} {note}".rstrip())
        self.sections.append(Section(title, result, on_page))

    def skip(self, part: str, why: str) -> None:
        """Note once what of the analysis cannot be done."""
        if (skipped := Skipped(self.analysis, part, why)) not in self.skipped:
            self.skipped.append(skipped)

    def skip_all(self, reasons: Mapping[str, str]) -> None:
        """Note what cannot be done, and why."""
        for part, why in reasons.items():
            self.skip(part, why)

    @contextmanager
    def attempt(self, part: str) -> Iterator[None]:
        """Note what goes wrong inside, and go on after it."""
        try:
            yield
        except EXPECTED as error:
            if self.options.strict and not isinstance(error, SkipError):
                raise
            self.skip(part, str(error) or type(error).__name__)

    def draw(self) -> None:
        """Draw what was found, all of it to one scale."""
        results = [section.result for section in self.sections]
        extent = max((result.extent for result in results if not math.isnan(result.extent)), default=None)
        for section in self.sections:
            section.pictures = section.result.pictures(extent)


def file_name(*parts: str) -> str:
    """A name for files, of lower-case letters, digits and hyphens, up to 60 of each part; others may have the same."""
    slugs = (re.sub(r"[^a-z0-9]+", "-", part.lower())[:60].strip("-") for part in parts)
    return "-".join(filter(None, slugs))


# ---- the page


def render(studies: Sequence[Study], parts: Sequence[Part], skipped: Sequence[Skipped], command: str | None) -> str:
    """The whole page as HTML, of parts that are drawn."""
    import fastmask

    shown = [section for part in parts for section in part.sections if section.on_page]
    tables = {}
    for section in shown:
        own = sorted(section.result.tables().items(), key=lambda item: len(item[1]))  # summaries first
        tables[section.result.name] = {name: table.copy() for name, table in own}
    # A column `p_page` beside each `p`: corrected over all tests of the page (Holm).
    tested = [table for of_section in tables.values() for table in of_section.values() if "p" in table]
    p_values = [p for table in tested for p in table.p]
    corrected = iter(holm(p_values))
    for table in tested:
        table.insert(table.columns.get_loc("p") + 1, "p_page", [next(corrected) for _ in table.p])
    used, pictures = 0, {}
    for section in shown:
        picture = _for_the_page(section.pictures["svg"])
        used += len(picture["content"])
        pictures[section.result.name] = picture if used <= ROOM else None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        studies=studies,
        parts=parts,
        shows=SHOWS,
        tables=tables,
        pictures=pictures,
        cells_of=_table,
        results=_results(parts, tables),
        tests=sum(not math.isnan(p) for p in p_values),
        families=_families(studies),
        skipped=skipped,
        command=command,
        date=datetime.date.today().isoformat(),
        versions={
            "fastmask": fastmask.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
            "machine": platform.machine(),
        },
    )


def _results(parts: Sequence[Part], tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """Every method against its baselines, with p-values over the whole page; empty where effects were not analysed."""
    return pd.DataFrame(
        {
            "method": row.method,
            "against": row.against,
            "on": section.title.partition(",")[0],
            "difference": f"{row.difference:+.2f}",
            "95% interval": f"{row.low:+.2f} to {row.high:+.2f}",
            "languages better": f"{row.languages_better} of {row.languages}",
            "seeds agree": f"{row.seeds_agree} of {row.seeds}",
            "p": row.p,
            "p_page": row.p_page,
            "verdict": verdict(row, row.p_page),
        }
        for part in parts
        if part.analysis == "effect"
        for section in part.sections
        for row in tables[section.result.name][f"{section.result.name}_methods"].itertuples()
    )


def _families(studies: Sequence[Study]) -> dict[str, tuple[str, str]]:
    """Family -> its languages, and the colour that their names have."""
    families = families_of(dict.fromkeys(name for study in studies for name in study.languages))
    names = {family: [name for name, own in families.items() if own == family] for family in families.values()}
    return {family: (", ".join(of_family), family_colour(family, "inherit")) for family, of_family in names.items()}


def _for_the_page(svg: bytes) -> dict[str, Any]:
    """A picture of matplotlib in the page's colours and without what nobody sees; in base64, and its width."""
    width = re.search(rb'<svg[^>]*? width="([0-9.]+)pt"', svg)
    assert width is not None

    def shortened(tag: re.Match[bytes]) -> bytes:
        text = NEEDLESS.sub(b"", tag[0].replace(b"#000000", b"currentColor"))
        return re.sub(rb"\s+", b" ", re.sub(rb"(\.[0-9]{2})[0-9]+", rb"\1", text))  # hundredths of a point

    svg = re.sub(rb"<metadata>.*?</metadata>", THEME, svg, flags=re.DOTALL)
    svg = re.sub(rb"<[^>]+>", shortened, re.sub(rb"<!--.*?-->", b"", svg))
    svg = re.sub(rb">\s+<", b"><", svg)
    return {"content": base64.b64encode(svg).decode("ascii"), "width": round(float(width[1]) * 4 / 3)}


def _table(table: pd.DataFrame) -> dict[str, Any]:
    shown = table.drop(columns=[column for column in table if column.endswith("_p")])  # not among the page's tests
    numeric = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in shown.dtypes]
    return {
        "columns": list(zip((column.replace("_", " ") for column in shown.columns), numeric, strict=True)),
        "rows": [list(map(_cell, row, shown.columns)) for row in shown.itertuples(index=False)],
        "shown": len(shown) <= SHOWN_ROWS,
    }


def _cell(value: Any, column: str) -> tuple[str, str]:
    """Text and colour."""
    if isinstance(value, float):
        is_p = "p" in column.split("_")
        return (p_text(value) if is_p else "–" if math.isnan(value) else f"{value:.4g}"), ""
    colour = language_colour(str(value), "") if column.partition("_")[0] == "language" else ""
    return "yes" if value is True else "no" if value is False else str(value), colour
