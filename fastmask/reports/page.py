"""``report.html``: one file that needs nothing beside it, made of a template with escaping on."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import pandas as pd
import torch
import transformers
from PIL import Image

from fastmask.analysis.statistics import p_text
from fastmask.reports.analyses import Analysis
from fastmask.reports.folders import Study
from fastmask.reports.sections import Section, Skipped

__all__ = ["OPEN_ROWS", "SHOWN_ROWS", "Part", "page"]

TEMPLATE = "report.html.j2"
OPEN_ROWS = 12  # longer tables are folded
SHOWN_ROWS = 100  # of longer tables the rest is in the CSV file


@dataclass(frozen=True)
class Part:
    """The sections of one analysis of one study."""

    study: Study
    analysis: Analysis
    sections: list[Section]


def page(studies: Sequence[Study], parts: Sequence[Part], skipped: Sequence[Skipped], command: str | None) -> str:
    """The page as HTML.

    Args:
        studies: what was analysed.
        parts: in their order.
        skipped: what is not there, and why.
        command: to make the report again.
    """
    import fastmask

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    versions = {
        "fastmask": fastmask.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "machine": platform.machine(),
    }
    return environment.from_string(text).render(
        title=f"Analyses of {', '.join(study.title for study in studies)}",
        date=datetime.date.today().isoformat(),
        studies=[_study(study) for study in studies],
        several=len(studies) > 1,
        parts=[_part(part, number) for number, part in enumerate(parts, start=1)],
        skipped=skipped,
        versions=versions,
        command=command,
    )


def _study(study: Study) -> dict[str, Any]:
    days = sorted(run.finished for run in study.runs)
    rows = []
    for variant, runs in study.variants.items():
        config = runs[0].config
        seeds = ", ".join(str(run.config.seed) for run in runs)
        rows.append([variant, seeds, str(config.steps), config.model, runs[0].folder.resolve().as_posix()])
    shown = study.settings
    if shown is None:
        shown = {run.folder.name: vars(run.config) for run in study.runs}
    return {
        "title": study.title,
        "days": " to ".join(dict.fromkeys(day.isoformat() for day in (days[0], days[-1]))),
        "rows": rows,
        "settings": {name: _settings(values) for name, values in shown.items()},
    }


def _settings(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items() if value is not None)


def _part(part: Part, number: int) -> dict[str, Any]:
    return {
        "id": f"part-{number}-{part.analysis.name}",  # no section is called so
        "study": part.study.title,
        "title": part.analysis.title,
        "shows": part.analysis.shows,
        "sections": [_section(section) for section in part.sections],
    }


def _section(section: Section) -> dict[str, Any]:
    tables = sorted(section.tables.items(), key=lambda item: len(item[1]) > OPEN_ROWS)  # summaries first
    return {
        "id": section.name,
        "title": section.title,
        "caption": section.caption,
        "folded": section.folded,
        "picture": base64.b64encode(_with_palette(section.pictures["png"])).decode("ascii"),
        "tables": [_table(name, table) for name, table in tables if len(table)],
        "files": list(section.files),
    }


def _with_palette(png: bytes) -> bytes:
    """The picture in 256 colours, which takes a third of the bytes; the file beside the page has them all."""
    picture, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _table(name: str, table: pd.DataFrame) -> dict[str, Any]:
    numeric = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in table.dtypes]
    return {
        "name": name,
        "columns": list(zip((str(column).replace("_", " ") for column in table.columns), numeric, strict=True)),
        "rows": [list(map(_text, row, table.columns)) for row in table.head(SHOWN_ROWS).itertuples(index=False)],
        "length": len(table),
        "shown": min(len(table), SHOWN_ROWS),
        "folded": len(table) > OPEN_ROWS,
    }


def _text(value: Any, column: Any) -> str:
    if isinstance(value, float):
        is_p = "p" in str(column).split("_")  # p, p_holm, score_p
        return "–" if math.isnan(value) else p_text(value) if is_p else f"{value:.4g}"
    return "yes" if value is True else "no" if value is False else str(value)
