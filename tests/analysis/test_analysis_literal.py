"""Every analysis of masks and scores on random input against loops written out in plain Python.

Gradient conflict and ablation have theirs in `test_gradient_conflict` and `test_analysis_ablation`, the bootstrap in
`test_statistics` and `test_analysis_effect`.
"""

from __future__ import annotations

import itertools

import literal_analyses as literal
import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

import fastmask as fm
from fastmask.dynamic import Snapshot

LANGUAGES = ["en", "no", "hi", "ur"]
SEEDS = [0, 1, 2]


def masks_of(keep):
    """Live units of each layer, from bool [layers, units]."""
    return [set(layer.nonzero().flatten().tolist()) for layer in keep]


def random_heads(seed, layers=2, units=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(LANGUAGES), layers, units, generator=generator) < 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("same_start", [True, False])
def test_overlap(seed, same_start):
    """The Jaccard similarity of each pair, and what random masks would have, equal the literal computation."""
    runs = [random_heads(10 * seed), random_heads(10 * seed + 1)]
    subnets = [fm.Subnetworks(LANGUAGES, heads=heads) for heads in runs]
    table = fm.analysis.overlap(subnets[0], seeds=[subnets[1]], same_start=same_start).table
    every = list(itertools.combinations(itertools.product(range(2), range(len(LANGUAGES))), 2))
    pairs = [(a, b) for a, b in every if same_start or a[0] == b[0]]
    assert len(table) == len(pairs) == (28 if same_start else 12)
    for row, ((seed_a, a), (seed_b, b)) in zip(table.itertuples(), pairs, strict=True):
        names = (row.seed_a, row.language_a, row.seed_b, row.language_b)
        assert names == (seed_a, LANGUAGES[a], seed_b, LANGUAGES[b])
        one, other = masks_of(runs[seed_a][a]), masks_of(runs[seed_b][b])
        assert row.jaccard == pytest.approx(literal.jaccard(one, other))
        assert row.expected == pytest.approx(literal.expected_jaccard(one, other, 4))


@pytest.mark.parametrize("seed", SEEDS)
def test_unit_use(seed):
    """How many languages own each unit, and what random masks would give, equal the literal count."""
    heads = random_heads(seed)
    result = fm.analysis.unit_use(fm.Subnetworks(LANGUAGES, heads=heads))
    masks = [masks_of(keep) for keep in heads]
    for row in result.table.itertuples():
        assert row.owners == literal.owners(masks, row.layer, row.unit)
        assert row.languages == " ".join(n for n, m in zip(LANGUAGES, masks, strict=True) if row.unit in m[row.layer])
    numbers = {"all": len(LANGUAGES), "one": 1, "none": 0}
    for row in result.more["layers"].itertuples():
        wanted = numbers[row.group]
        assert row.count == sum(literal.owners(masks, row.layer, unit) == wanted for unit in range(4))
        sizes = [len(mask[row.layer]) for mask in masks]
        choices = [[set(chosen) for chosen in itertools.combinations(range(4), size)] for size in sizes]
        counts = [
            sum(sum(unit in chosen for chosen in combined) == wanted for unit in range(4))
            for combined in itertools.product(*choices)
        ]
        assert row.expected == pytest.approx(np.mean(counts))


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamics(seed):
    """Churn, distance and the mean over pairs at each step equal the literal computation."""
    generator = np.random.default_rng(seed)
    history = [(0, name, random_heads(seed)[row]) for row, name in enumerate(LANGUAGES)]
    for step in (10, 20, 40):
        for row, name in enumerate(LANGUAGES):
            if generator.random() < 0.6:
                history.append((step, name, random_heads(100 * seed + step)[row]))
    snapshots = [Snapshot(step, name, fm.Subnetworks([name], keep[None])) for step, name, keep in history]
    result = fm.analysis.dynamics(snapshots)
    wanted = literal.churn_and_distance([(step, name, masks_of(keep)) for step, name, keep in history])
    assert len(result.table) == len(wanted)
    for row in result.table.itertuples():
        assert (row.churn, row.distance) == pytest.approx(wanted[row.step, row.language]), (row.step, row.language)
    for row in result.more["pairs"].itertuples():
        now = {name: masks_of(keep) for step, name, keep in history if step <= row.step}
        one_family = [("en", "no"), ("hi", "ur")]
        pairs = [p for p in itertools.combinations(LANGUAGES, 2) if (p in one_family) == (row.relation == "one family")]
        assert row.jaccard == pytest.approx(np.mean([literal.jaccard(now[a], now[b]) for a, b in pairs]))
        assert row.random == pytest.approx(np.mean([literal.expected_jaccard(now[a], now[b], 4) for a, b in pairs]))


@pytest.mark.parametrize("seed", SEEDS)
def test_cross_evaluation(seed):
    """The advantage of own subnetworks, its p-value and the means equal the literal computation."""
    generator = np.random.default_rng(seed)
    values = {pair: float(generator.normal(60, 2)) for pair in itertools.product(LANGUAGES, [*LANGUAGES, "full"])}
    result = fm.analysis.cross_evaluation(lambda a, b: values[a, b], LANGUAGES, controls=("full",))
    own, p = literal.advantages(values, LANGUAGES)
    rows = result.more["languages"].set_index("language")
    assert rows.advantage.to_dict() == pytest.approx(own)
    assert rows.best.to_dict() == {a: max(LANGUAGES, key=lambda b, a=a: values[a, b]) for a in LANGUAGES}
    overall = result.more["overall"].iloc[0]
    assert overall.p == pytest.approx(p)
    assert overall.own_minus_full == pytest.approx(np.mean([values[a, a] - values[a, "full"] for a in LANGUAGES]))


@pytest.mark.parametrize("seed", SEEDS)
def test_typology(seed):
    """The correlation of gains with similarity, and its p-value, equal the literal computation."""
    generator = np.random.default_rng(seed)
    unseen = ["de", "fi", "ja", "fr", "ta", "fo"]
    gains = {name: generator.normal(size=3).round(1).tolist() for name in unseen}
    near = {name: {other: float(generator.integers(5)) / 4 for other in LANGUAGES} for name in unseen}
    found = fm.analysis.typology(gains, near).more["correlation"].iloc[0]
    x = [max(near[name].values()) for name in unseen]
    y = [sum(gains[name]) / 3 for name in unseen]
    assert (found.rho, found.p) == pytest.approx(literal.rank_correlation(x, y))


@pytest.mark.parametrize("seed", SEEDS)
def test_effect(seed):
    """The paired differences to the baseline, and their p-values, equal the literal computation."""
    generator = np.random.default_rng(seed)
    methods, seeds = ["full", "static", "random"], [0, 1, 2]
    score = {key: float(generator.normal(60, 2)) for key in itertools.product(methods, LANGUAGES, seeds)}
    rows = [{"method": m, "language": c, "seed": s, "score": value} for (m, c, s), value in score.items()]
    result = fm.analysis.effect([rows[at] for at in generator.permutation(len(rows))])
    for row in result.table.itertuples():
        d = [score[row.method, row.language, s] - score["full", row.language, s] for s in seeds]
        assert row.difference == pytest.approx(sum(d) / 3)
    for row in result.more["methods"].itertuples():
        d = {(c, s): score[row.method, c, s] - score["full", c, s] for c in LANGUAGES for s in seeds}
        assert row.difference == pytest.approx(np.mean(list(d.values())))
        means = [sum(d[c, s] for s in seeds) / 3 for c in LANGUAGES]
        of_seeds = [sum(d[c, s] for c in LANGUAGES) / len(LANGUAGES) for s in seeds]
        assert row.p == pytest.approx(max(literal.sign_flip(means), ttest_1samp(of_seeds, 0).pvalue))
        assert row.languages_better == sum(value > 0 for value in means)
        by_seed = [sum(d[c, s] for c in LANGUAGES) for s in seeds]
        assert row.seeds_agree == sum((value > 0) == (row.difference > 0) for value in by_seed)
