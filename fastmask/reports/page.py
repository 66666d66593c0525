"""``report.html``: one file that needs nothing beside it, made of a template with escaping on."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import pandas as pd
import torch
import transformers

from fastmask.analysis.effects import verdict
from fastmask.analysis.language_families import families_of, family_colour
from fastmask.analysis.statistics import holm, p_text
from fastmask.reports.folders import Study
from fastmask.reports.sections import Section, Skipped

__all__ = ["ROOM", "SHOWN_ROWS", "Part", "page"]

TEMPLATE = "report.html.j2"
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


@dataclass(frozen=True)
class Part:
    """One analysis, by its name, of one study: its sections, what could not be done, and how many seconds it took."""

    study: Study
    analysis: str
    sections: list[Section]
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0


def page(studies: Sequence[Study], parts: Sequence[Part], skipped: Sequence[Skipped], command: str | None) -> str:
    """The page as HTML.

    Args:
        studies: what was analysed.
        parts: in their order.
        skipped: what is not there, and why.
        command: to make the report again.
    """
    import fastmask

    parts = _corrected(parts)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    room = iter(_pictures(parts))
    return environment.from_string(text).render(
        title=f"Analyses of {', '.join(study.title for study in studies)}",
        date=datetime.date.today().isoformat(),
        studies=[_study(study) for study in studies],
        families=_families(studies),
        several=len(studies) > 1,
        tests=sum(1 for _ in _tests(parts)),
        results=_results(parts),
        parts=[_part(part, number, room) for number, part in enumerate(parts, start=1)],
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


# ---- the tests of the whole page


def _tests(parts: Sequence[Part]) -> Iterator[float]:
    """Every p-value in the tables of the page."""
    for part in parts:
        for section in part.sections:
            for table in section.result.tables().values() if section.on_page else ():
                yield from table.p.dropna() if "p" in table else ()


def _corrected(parts: Sequence[Part]) -> list[Part]:
    """A column `p_page` beside each `p`: corrected over all tests of the page (Holm)."""
    corrected = iter(holm(list(_tests(parts))))

    def table_of(table: pd.DataFrame) -> pd.DataFrame:
        if "p" not in table:
            return table
        table = table.copy()
        values = [next(corrected) if known else math.nan for known in table.p.notna()]
        table.insert(table.columns.get_loc("p") + 1, "p_page", values)
        return table

    def section_of(section: Section) -> Section:
        if not section.on_page:
            return section
        result = replace(section.result, table=table_of(section.result.table))  # in the order of `tables`
        return replace(
            section, result=replace(result, more={name: table_of(table) for name, table in result.more.items()})
        )

    return [replace(part, sections=[section_of(section) for section in part.sections]) for part in parts]


def _results(parts: Sequence[Part]) -> dict[str, Any] | None:
    """Every method against its baselines, with p-values over the whole page; None where effects were not analysed."""
    rows = []
    for part in parts:
        for section in part.sections if part.analysis == "effect" else ():
            for row in section.result.more["methods"].itertuples():
                found = {"method": row.method, "against": row.against, "on": section.title.partition(",")[0]}
                found |= {"difference": f"{row.difference:+.2f}", "95% interval": f"{row.low:+.2f} to {row.high:+.2f}"}
                found |= {"languages better": f"{row.languages_better} of {row.languages}"}
                found |= {"seeds agree": f"{row.seeds_agree} of {row.seeds}", "p": row.p, "p_page": row.p_page}
                rows.append({**found, "verdict": verdict(row, row.p_page)})
    table = pd.DataFrame(rows)
    return {**_table("results", table), "verdicts": table.verdict.value_counts().to_dict()} if rows else None


# ---- what the template shows


def _study(study: Study) -> dict[str, Any]:
    days = sorted(run.finished for run in study.runs)
    rows = []
    for variant, runs in study.variants.items():
        config = runs[0].config
        seeds = ", ".join(str(run.config.seed) for run in runs)
        rows.append([variant, seeds, str(config.steps), config.model, runs[0].folder.resolve().as_posix()])
    shown = study.settings or {run.folder.name: vars(run.config) for run in study.runs}
    return {
        "title": study.title,
        "days": " to ".join(dict.fromkeys(day.isoformat() for day in (days[0], days[-1]))),
        "rows": rows,
        "settings": {
            name: "\n".join(f"{key}: {value}" for key, value in values.items() if value is not None)
            for name, values in shown.items()
        },
    }


def _families(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """The families of all languages, with the colour that their names have on the page."""
    languages = dict.fromkeys(name for study in studies for name in study.languages)
    found: dict[str, list[str]] = {}
    for language, family in families_of(languages).items():
        found.setdefault(family, []).append(language)
    return [
        {"name": family, "languages": ", ".join(names), "colour": family_colour(family, "inherit")}
        for family, names in found.items()
    ]


def _part(part: Part, number: int, room: Iterator[Any]) -> dict[str, Any]:
    title, shows = SHOWS[part.analysis]
    return {
        "id": f"part-{number}-{part.analysis}",  # no section is called so
        "study": part.study.title,
        "title": title,
        "shows": shows,
        "sections": [_section(section, next(room)) for section in part.sections if section.on_page],
        "beside": [section.result.name for section in part.sections if not section.on_page],
    }


def _section(section: Section, picture: Mapping[str, Any] | None) -> dict[str, Any]:
    tables = sorted(section.result.tables().items(), key=lambda item: len(item[1]))  # summaries first
    return {
        "id": section.result.name,
        "title": section.title,
        "caption": section.result.caption,
        "picture": picture,
        "tables": [_table(name, table) for name, table in tables if len(table)],
    }


def _pictures(parts: Sequence[Part]) -> Iterator[dict[str, Any] | None]:
    """The picture of each section on the page, as long as there is room."""
    used = 0
    for section in (section for part in parts for section in part.sections if section.on_page):
        svg, width = _for_the_page(section.pictures["svg"])
        used += len(svg)
        yield {"content": svg, "width": width} if used <= ROOM else None


def _for_the_page(svg: bytes) -> tuple[str, int]:
    """A picture of matplotlib in the page's colours and without what nobody sees; in base64, and its width."""
    width = re.search(rb'<svg[^>]*? width="([0-9.]+)pt"', svg)
    assert width is not None

    def shortened(tag: re.Match[bytes]) -> bytes:
        text = NEEDLESS.sub(b"", tag[0].replace(b"#000000", b"currentColor"))
        return re.sub(rb"\s+", b" ", re.sub(rb"(\.[0-9]{2})[0-9]+", rb"\1", text))  # hundredths of a point

    svg = re.sub(rb"<metadata>.*?</metadata>", THEME, svg, flags=re.DOTALL)
    svg = re.sub(rb"<[^>]+>", shortened, re.sub(rb"<!--.*?-->", b"", svg))
    svg = re.sub(rb">\s+<", b"><", svg)
    return base64.b64encode(svg).decode("ascii"), round(float(width[1]) * 4 / 3)


def _table(name: str, table: pd.DataFrame) -> dict[str, Any]:
    shown = table.drop(columns=[column for column in table if str(column).endswith("_p")])  # not among the page's tests
    numeric = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in shown.dtypes]
    return {
        "name": name,
        "columns": list(zip((str(column).replace("_", " ") for column in shown.columns), numeric, strict=True)),
        "rows": [list(map(_cell, row, shown.columns)) for row in shown.itertuples(index=False)],
        "length": len(shown),
        "shown": len(shown) <= SHOWN_ROWS,
    }


def _cell(value: Any, column: Any) -> tuple[str, str]:
    """Text and colour."""
    if isinstance(value, float):
        is_p = "p" in str(column).split("_")
        return (p_text(value) if is_p else "–" if math.isnan(value) else f"{value:.4g}"), ""
    if str(column).partition("_")[0] == "language":
        return str(value), family_colour(families_of([str(value)])[str(value)], "")
    return "yes" if value is True else "no" if value is False else str(value), ""
