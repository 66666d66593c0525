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

import jinja2
import pandas as pd
import torch
import transformers

from fastmask.analysis.drawing import families_of, family_colour, language_colour
from fastmask.analysis.effects import verdict
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import holm, p_text
from fastmask.reports.runs import Options, SkipError, Study

__all__ = ["EXPECTED", "ROOM", "SHOWN_ROWS", "Part", "Section", "Skipped", "file_name", "page"]

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
    "effect": (
        "Effect of each method",
        "What each method does to each language's score, against the full network and against random masks of the same "
        "sizes, and what of it is inside the noise.",
    ),
    "overlap": (
        "Overlap of masks",
        "How much the languages' subnetworks have in common, beside random masks of the same sizes.",
    ),
    "heads": (
        "Use of heads and neurons",
        "How many languages own each head or neuron, and how many units all, one or none of them own.",
    ),
    "conflict": (
        "Gradient conflict",
        "Whether the languages' gradients pull the shared parameters the same way, beside how far one language's "
        "gradients agree with themselves.",
    ),
    "cross": (
        "Cross-evaluation",
        "How well each language is parsed by every language's subnetwork, and whether its own is the best.",
    ),
    "typology": ("Typology", "Whether unseen languages gain more, the nearer they are to a training language."),
    "ablation": (
        "Ablation of single heads",
        "What each head is worth to each language, and whether the importance score foresees it.",
    ),
    "dynamics": (
        "Dynamics of masks",
        "How dynamic masks move in training: what changes, how far they get, whether related languages' come together.",
    ),
}


class Skipped(NamedTuple):
    """What could not be done: the analysis, what of it ("" for all), and why."""

    analysis: str
    part: str
    why: str

    def __str__(self) -> str:
        return f"{self.analysis}{f' ({self.part})' if self.part else ''}: {self.why}"


@dataclass
class Section:
    """One analysis of something.

    Attributes:
        title: what was analysed.
        result: its name is that of its files.
        on_page: False for more of the same, such as another seed: its files stand beside the page.
        pictures: "png", "svg" -> the file's content, once it is drawn.
    """

    title: str
    result: Result
    on_page: bool = True
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class Part:
    """What one analysis finds in one study.

    Attributes:
        study: what is analysed.
        analysis: its name.
        options: what holds for it.
        stem: what the names of its files begin with.
        taken: names of files, of the whole report.
        sections: what was found.
        skipped: what could not be done.
        seconds: how long it took.
    """

    study: Study
    analysis: str
    options: Options = field(default_factory=Options)
    stem: str = ""
    taken: set[str] = field(default_factory=set)
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


def page(studies: Sequence[Study], parts: Sequence[Part], skipped: Sequence[Skipped], command: str | None) -> str:
    """The whole page as HTML.

    Args:
        studies: what was analysed.
        parts: in their order, drawn.
        skipped: what is not there, and why.
        command: to make the report again.
    """
    import fastmask

    shown = [section for part in parts for section in part.sections if section.on_page]
    tables = {
        section.result.name: {name: table.copy() for name, table in section.result.tables().items()}
        for section in shown
    }
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

    def of_section(section: Section) -> dict[str, Any]:
        name = section.result.name
        own = sorted(tables[name].items(), key=lambda item: len(item[1]))  # summaries first
        return {
            "id": name,
            "title": section.title,
            "caption": section.result.caption,
            "picture": pictures[name],
            "tables": [_table(title, table) for title, table in own if len(table)],
        }

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=f"Analyses of {', '.join(study.title for study in studies)}",
        date=datetime.date.today().isoformat(),
        studies=[_study(study) for study in studies],
        families=_families(studies),
        several=len(studies) > 1,
        tests=sum(not math.isnan(p) for p in p_values),
        results=_results(parts, tables),
        parts=[
            {
                "id": f"part-{number}-{part.analysis}",  # no section is called so
                "study": part.study.title,
                "title": SHOWS[part.analysis][0],
                "shows": SHOWS[part.analysis][1],
                "sections": [of_section(section) for section in part.sections if section.on_page],
                "beside": [section.result.name for section in part.sections if not section.on_page],
            }
            for number, part in enumerate(parts, start=1)
        ],
        skipped=skipped,
        versions={
            "fastmask": fastmask.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
            "machine": platform.machine(),
        },
        command=command,
    )


def _results(parts: Sequence[Part], tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> dict[str, Any] | None:
    """Every method against its baselines, with p-values over the whole page; None where effects were not analysed."""
    rows = [
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
    ]
    table = pd.DataFrame(rows)
    return {**_table("results", table), "verdicts": table.verdict.value_counts().to_dict()} if rows else None


def _study(study: Study) -> dict[str, Any]:
    dates = [datetime.date.fromtimestamp((run.folder / "model").stat().st_mtime).isoformat() for run in study.runs]
    rows = []
    for variant, runs in study.variants.items():
        config, seeds = runs[0].config, ", ".join(str(run.config.seed) for run in runs)
        rows.append([variant, seeds, str(config.steps), config.model, runs[0].folder.resolve().as_posix()])
    shown = study.settings or {run.folder.name: vars(run.config) for run in study.runs}
    return {
        "title": study.title,
        "days": " to ".join(dict.fromkeys((min(dates), max(dates)))),
        "rows": rows,
        "settings": {
            name: "\n".join(f"{key}: {value}" for key, value in values.items() if value is not None)
            for name, values in shown.items()
        },
    }


def _families(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """The families of all languages that have subnetworks or scores, with the colour that their names have."""
    found: dict[str, list[str]] = {}
    owning = [name for study in studies for run in study.runs if (masks := run.masks) for name in masks.languages]
    scored = [name for study in studies if study.scores is not None for name in study.scores["language"]]
    for language, family in families_of(dict.fromkeys(owning + scored)).items():
        found.setdefault(family, []).append(language)
    return [
        {"name": family, "languages": ", ".join(names), "colour": family_colour(family, "inherit")}
        for family, names in found.items()
    ]


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


def _table(name: str, table: pd.DataFrame) -> dict[str, Any]:
    shown = table.drop(columns=[column for column in table if column.endswith("_p")])  # not among the page's tests
    numeric = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in shown.dtypes]
    return {
        "name": name,
        "columns": list(zip((column.replace("_", " ") for column in shown.columns), numeric, strict=True)),
        "rows": [list(map(_cell, row, shown.columns)) for row in shown.itertuples(index=False)],
        "length": len(shown),
        "shown": len(shown) <= SHOWN_ROWS,
    }


def _cell(value: Any, column: str) -> tuple[str, str]:
    """Text and colour."""
    if isinstance(value, float):
        is_p = "p" in column.split("_")
        return (p_text(value) if is_p else "–" if math.isnan(value) else f"{value:.4g}"), ""
    colour = language_colour(str(value), "") if column.partition("_")[0] == "language" else ""
    return "yes" if value is True else "no" if value is False else str(value), colour
