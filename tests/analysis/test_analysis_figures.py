"""Pictures: no text lies on another with many languages, no display and no global state, files that are whole."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import fastmask as fm
from fastmask.dynamic import Snapshot

CODES = "en ar cs hi it ko no ru fi de ja fa hy fo vi kk ta te sv fr br hr hsb bxr es pt pl nl ur zh".split()  # noqa: SIM905


def masks(languages, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(languages), 4, 8)
    return fm.Subnetworks(
        languages,
        heads=torch.rand(shape, generator=generator) < 0.6,
        neurons=torch.rand(len(languages), 4, 64, generator=generator) < 0.5,
    )


def overlap(languages):
    return fm.analysis.overlap(masks(languages), seeds=[masks(languages, 1)])


def use(languages):
    return fm.analysis.unit_use(masks(languages))


def use_of_neurons(languages):
    return fm.analysis.unit_use(masks(languages), units="neurons")


def effect(languages):
    generator = np.random.default_rng(0)
    keys = itertools.product(("full", "static", "random"), languages, range(3))
    rows = [{"method": m, "language": c, "seed": s, "score": generator.normal(60, 2)} for m, c, s in keys]
    return fm.analysis.effect(rows)


def cross(languages):
    generator = np.random.default_rng(0)
    return fm.analysis.cross_evaluation(lambda a, b: generator.normal(60, 2), languages)


def specificity(languages):
    generator = np.random.default_rng(0)
    return fm.analysis.specificity(lambda a, b: generator.normal(60, 2), languages)


def typology(languages):
    generator = np.random.default_rng(0)
    near = {c: round(generator.beta(2, 2), 1) for c in languages}
    return fm.analysis.typology({c: list(generator.normal(size=3)) for c in languages}, near)


def dynamics(languages):
    history = []
    for step in range(0, 1500, 300):
        subnets = masks(languages, step)
        history += [Snapshot(step, c, subnets.select([c])) for c in languages]
    return fm.analysis.dynamics(history)


def conflict(languages):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 64}
    torch.manual_seed(0)
    model = fm.attach(BertModel(BertConfig(vocab_size=40, **sizes)), masks(languages))
    ids = torch.randint(0, 40, (len(languages), 2, 1, 3))
    batches = {c: list(ids[row]) for row, c in enumerate(languages)}
    return fm.analysis.gradient_conflict(model, lambda b: model(b)[0][:, 0, :3].exp().sum(1), batches)


def ablation(languages):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=40, **sizes))
    fm.attach(model, fm.Subnetworks.random(model, languages, 0.6, seed=0, units="heads"))
    batches = {c: [torch.full((2, 3), row)] for row, c in enumerate(languages)}
    return fm.analysis.ablation(model, lambda b: model(b)[0][:, 0, :3].exp().sum(1), batches)


ANALYSES = [overlap, use, use_of_neurons, effect, cross, specificity, typology, dynamics, conflict, ablation]


@pytest.mark.parametrize(
    ("analysis", "languages"),
    # Each with many languages; the one that flips every head of every language with some.
    [
        pytest.param(
            analysis,
            languages,
            id=f"{analysis.__name__}-{len(languages)}",
            marks=pytest.mark.slow if (analysis is ablation) == (languages is CODES) else (),
        )
        for analysis in ANALYSES
        for languages in (CODES[:8], CODES)
    ],
)
def test_no_text_lies_on_another(analysis, languages, monkeypatch):
    """Every label of a picture can be read: none overlaps another or is cut off."""
    figure, drawn = analysis(languages).figure(), {}
    canvas, draw = FigureCanvasAgg(figure), Text.draw
    canvas.draw()  # the layout settles

    def recorded(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = Text.get_window_extent(text, renderer)  # of an annotation without its arrow
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    canvas.draw()
    texts = [(text.get_text(), box) for text, box in drawn.items()]
    width, height = canvas.get_width_height()
    assert len(texts) > len(languages)
    for name, box in texts:
        assert box.x0 > -1, name
        assert box.y0 > -1, name
        assert box.x1 < width + 1, name
        assert box.y1 < height + 1, name
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 1.5, f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("analysis", ANALYSES)
def test_names_are_drawn_as_they_are(analysis, monkeypatch):
    """A name that looks like markup is drawn letter by letter."""
    names = ["_en", "<i>--", "[/b]", "a&b"]
    result, drawn, draw = analysis(names), [], Text.draw

    def recorded(text, renderer):
        if text.get_visible() and text.get_text():
            drawn.append(text.get_text())
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    ElementTree.fromstring(result.pictures()["svg"])
    if analysis not in (use, use_of_neurons):  # they draw layers
        assert set(names) <= set(drawn)


def test_save_writes_tables_and_pictures(tmp_path):
    """Each table and each picture of a result is in a file, whole."""
    result = overlap(CODES[:4])
    paths = result.save(tmp_path / "new")
    names = ["overlap.csv", "overlap_relations.csv", "overlap_families.csv", "overlap.png", "overlap.svg"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    read = pd.read_csv(paths[0])
    pd.testing.assert_frame_equal(read, result.table, check_dtype=False)
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in paths[4].read_text()[-20:]


def test_one_language_or_equal_numbers():
    """The smallest inputs can be analysed and drawn."""
    fm.analysis.overlap(masks(["en"])).figure().draw_without_rendering()
    fm.analysis.overlap(masks(["en"]), seeds=[masks(["en"], 1)]).figure().draw_without_rendering()
    fm.analysis.cross_evaluation(lambda a, b: 1.0, ["en"]).figure().draw_without_rendering()
    fm.analysis.typology(dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 1.0)).figure().draw_without_rendering()
    fm.analysis.dynamics(
        [Snapshot(0, "en", fm.Subnetworks(["en"], torch.ones(1, 1, 2, dtype=torch.bool)))]
    ).figure().draw_without_rendering()


def test_a_picture_opens_no_window():
    """Nothing here imports pyplot, which picks a display and keeps every figure."""
    package = Path(fm.__file__).parent
    assert not [path.name for path in package.rglob("*.py") if "pyplot" in path.read_text(encoding="utf-8")]
