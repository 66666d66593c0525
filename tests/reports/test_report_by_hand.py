"""Every analysis of a report equals calling `fastmask.analysis` on what the run left."""

from __future__ import annotations

import json
from io import StringIO

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file

import fastmask as fm
from fastmask.models import attach
from fastmask.reports import Options, make_report
from fastmask.reports.other_masks import cross_values, mask_seed
from fastmask.reports.runs import batches_of, drawn, load_data, studies_of
from fastmask.subnetworks.controls import random_like
from fastmask.tasks.data.treebanks import load_treebanks
from fastmask.training.run_folder import complete, load_run
from fastmask.unseen import direction_profile, direction_similarity

LANGUAGES = ["qaa", "qab", "qac"]
OPTIONS = Options(seed=3, sentences=6)


@pytest.fixture(scope="module")
def tables_of(tmp_path_factory):
    """(folders, analysis) -> the CSV files of a report as tables."""

    def make(folders, what):
        out = tmp_path_factory.mktemp("report") / "out"
        make_report(folders, [what], out, OPTIONS)
        return {path.stem: pd.read_csv(path, keep_default_na=True) for path in out.glob("*.csv")}

    return make


def same(found, wanted):
    """Whether a table that was read from a CSV file is this one."""
    assert_frame_equal(found, pd.read_csv(StringIO(wanted.to_csv(index=False))), rtol=1e-5, atol=1e-7)


def masks_of(run):
    return fm.Subnetworks.load(run / "masks.safetensors")


def rows_of(run, split, language):
    """The sentences that the report draws."""
    (study,) = studies_of([run])
    splits, _ = load_data(study.runs[0], split)
    return drawn(splits, language, split, OPTIONS.sentences, OPTIONS.seed)


def attached_task(run):
    return load_run(run).task


def test_drawn_sentences_are_of_the_split(static_run, data):
    """Analyses run on sentences of the split they name, the same ones for every run."""
    drawn = rows_of(static_run, "test", "qab")
    whole = load_treebanks(data, "qab")["qab"]["test"]
    ids = [row["sent_id"] for row in drawn]
    assert len(set(ids)) == OPTIONS.sentences
    assert set(ids) <= set(whole["sent_id"])
    assert ids == [row["sent_id"] for row in rows_of(static_run, "test", "qab")]


def test_overlap_and_heads(comparison, tables_of):
    """The masks compared are those of the runs, units and seeds that the table names."""
    seeds = [masks_of(comparison / f"seed-{seed}" / "static" / "run") for seed in (0, 1)]
    found = tables_of([comparison], "overlap")
    for units in ("heads", "neurons"):
        wanted = fm.analysis.overlap(seeds[0], seeds=[seeds[1]], same_start=False, units=units, seed=3)
        same(found[f"overlap-{units}-static"], wanted.table)
        same(found[f"overlap-{units}-static_relations"], wanted.more["relations"])
    found = tables_of([comparison], "use")
    for seed in (0, 1):
        wanted = fm.analysis.unit_use(seeds[seed], units="heads", seed=3)
        same(found[f"use-heads-static-seed-{seed}"], wanted.table)
        same(found[f"use-heads-static-seed-{seed}_layers"], wanted.more["layers"])


def conflict_by_hand(task, run):
    parser = task.model
    batches = {name: batches_of(task, rows_of(run, "train", name), name) for name in LANGUAGES}
    return fm.analysis.gradient_conflict(
        parser.encoder, lambda batch: parser(batch).loss_per_sentence, batches, whole=parser
    )


def test_conflict(static_run, full_run, tables_of):
    """Gradients are those of the run's weights, of its drawn sentences, with and without masks."""
    found = tables_of([full_run, static_run], "conflict")
    wanted = {
        name: conflict_by_hand(attached_task(run), run) for name, run in (("full", full_run), ("static", static_run))
    }
    for name, result in wanted.items():
        same(found[f"conflict-{name}"], result.table)
        together = found["conflict-all"]
        mine = together[together.variant == name].drop(columns=["variant", "seed"]).reset_index(drop=True)
        same(mine, result.more["scopes"])
    assert set(wanted["static"].table.scope) - set(wanted["full"].table.scope) == {"shared"}


def test_conflict_along_checkpoints(static_run, tables_of):
    """Each checkpoint is analysed with the weights and masks it had."""
    found = tables_of([static_run], "conflict")["conflict-along-static-seed-0"]
    assert list(dict.fromkeys(found.step)) == [2, 3, 4, 6]
    networks = found.drop_duplicates("step").set_index("step").network
    assert networks.to_dict() == {2: "full network", 3: "full network", 4: "subnetworks", 6: "subnetworks"}
    # The last checkpoint is the finished model.
    added = ["variant", "seed", "step", "network"]
    last = found[found.step == 6].drop(columns=added).reset_index(drop=True)
    same(last, conflict_by_hand(attached_task(static_run), static_run).more["scopes"])
    second = next(path for path in complete(static_run) if path.name.endswith("2"))
    task = load_run(static_run, attached=False).task
    task.model.load_state_dict(load_file(second / "model.safetensors"))
    early = found[found.step == 2].drop(columns=added).reset_index(drop=True)
    same(early, conflict_by_hand(task, static_run).more["scopes"])


def test_cross(comparison, tables_of):
    """Each language is parsed by the subnetwork its column names, and seeds are averaged."""
    found = tables_of([comparison], "cross")
    languages = [*LANGUAGES, "qad", "qag", "qah"]
    (study,) = studies_of([comparison])
    splits, _ = load_data(study.runs[0], "test", None, study.unseen)
    rows = {language: drawn(splits, language, "test", 6, 3) for language in languages}
    values = {}
    for seed in (0, 1):
        run = comparison / f"seed-{seed}" / "static" / "run"
        subnets = masks_of(run)
        for name in [*LANGUAGES, "full", "random"]:
            task = load_run(run, attached=False).task
            attach(task.encoder, random_like(subnets, mask_seed(3)) if name == "random" else subnets)
            for place, language in enumerate(languages):
                own = subnets.index(language) if language in subnets.languages else place % 3
                network = {"full": None, "random": subnets.languages[own]}.get(name, name)
                las = task.scored(task.examples(rows[language]), network)["las"]
                values.setdefault((language, name), []).append(las)
    means = {pair: sum(of_seeds) / 2 for pair, of_seeds in values.items()}
    wanted = fm.analysis.cross_evaluation(lambda a, b: means[a, b], languages, LANGUAGES, seed=3)
    same(found["cross-static"], wanted.table)
    same(found["cross-static_overall"], wanted.more["overall"])
    seeds = found["cross-static_seeds"]
    assert len(seeds) == 2 * len(languages) * 5
    one = seeds[(seeds.seed == 1) & (seeds.language == "qad") & (seeds.subnetwork == "qab")]
    assert one.score.item() == pytest.approx(values["qad", "qab"][1])


def test_specificity(comparison, tables_of):
    """Each language is parsed by the whole network without the units its column names, and seeds are averaged."""
    found = tables_of([comparison], "specificity")
    (study,) = studies_of([comparison])
    splits, _ = load_data(study.runs[0], "test", None)
    rows = {language: drawn(splits, language, "test", 6, 3) for language in LANGUAGES}
    values, off = {}, []
    for seed in (0, 1):
        run = comparison / f"seed-{seed}" / "static" / "run"
        own = {}
        for kind, keep in masks_of(run).units.items():
            of_others = torch.stack([keep.sum(0) - keep[language].int() for language in range(3)])
            own[kind] = keep & (of_others == 0)
            own[kind] &= ~own[kind].all(-1, keepdim=True)
        off.append(sum(of_kind.sum((1, 2)) for of_kind in own.values()).tolist())
        left = fm.Subnetworks(LANGUAGES, **{kind: ~of_kind for kind, of_kind in own.items()})
        for name in ["nothing", *LANGUAGES, "random"]:
            task = load_run(run, attached=False).task
            attach(task.encoder, random_like(left, mask_seed(3)) if name == "random" else left)
            for language in LANGUAGES:
                network = {"nothing": None, "random": language}.get(name, name)
                las = task.scored(task.examples(rows[language]), network)["las"]
                values.setdefault((language, name), []).append(las)
    means = {pair: sum(of_seeds) / 2 for pair, of_seeds in values.items()}
    wanted = fm.analysis.specificity(lambda a, b: means[a, b], LANGUAGES, seed=3)
    same(found["specificity-static"], wanted.table)
    same(found["specificity-static_overall"], wanted.more["overall"])
    assert found["specificity-static_languages"]["units"].tolist() == [sum(of) / 2 for of in zip(*off, strict=True)]


def test_random_masks_are_not_those_of_a_run(static_run):
    """A run with random masks is compared with other random masks, not with its own."""
    found = masks_of(static_run)
    rows = {"qaa": rows_of(static_run, "test", "qaa")}
    for seed in (0, 1):
        of_run = random_like(found, seed)  # as training draws them
        control = random_like(of_run, mask_seed(seed))
        assert not torch.equal(of_run.heads, control.heads)
        assert torch.equal(of_run.heads.sum(-1), control.heads.sum(-1))
    task = load_run(static_run, attached=False).task
    assert set(cross_values(task, found, rows, 0)) == {("qaa", name) for name in [*LANGUAGES, "full", "random"]}


def test_ablation(static_run, tables_of):
    """Heads are flipped in the run's own network, and measured by the run's loss."""
    found = tables_of([static_run], "ablation")
    task = attached_task(static_run)
    parser = task.model
    batches = {name: batches_of(task, rows_of(static_run, "test", name), name) for name in LANGUAGES}
    wanted = fm.analysis.ablation(
        parser.encoder,
        lambda batch: parser(batch).loss_per_sentence,
        batches,
        whole=parser,
        seed=3,
    )
    same(found["ablation-static"], wanted.table)
    same(found["ablation-static_agreement"], wanted.more["agreement"])


def test_dynamics(dynamic_run, tables_of):
    """Masks are followed at the steps at which they were updated."""
    found = tables_of([dynamic_run], "dynamics")
    for units in ("heads", "neurons"):
        wanted = fm.analysis.dynamics(dynamic_run / "dynamic.safetensors", units=units, steps=[4, 5])
        same(found[f"dynamics-{units}-dynamic-seed-0"], wanted.table)
        assert set(wanted.table.step) == {0, 4, 5}  # frozen for the last step


def las_by_hand(comparison, method, condition, seed):
    """Language -> mean over support sets."""
    result = json.loads((comparison / f"seed-{seed}" / method / "result.json").read_text())
    found = {}
    for row in result["scores"]:
        if row["condition"] == condition:
            found.setdefault(row["language"], []).append(row["score"])
    return {language: sum(values) / len(values) for language, values in found.items()}


def test_effect_of_a_comparison(comparison, tables_of):
    """Scores of one condition and seed are compared, as means over support sets."""
    found = tables_of([comparison], "effect")
    for condition in ("seen", "adapted", "zero-shot"):
        rows = [
            {"method": method, "language": language, "seed": seed, "score": score}
            for method in ("full", "static")
            for seed in (0, 1)
            for language, score in las_by_hand(comparison, method, condition, seed).items()
        ]
        wanted = fm.analysis.effect(rows, seed=3)
        same(found[f"effect-{condition}"], wanted.table)
        same(found[f"effect-{condition}_methods"], wanted.more["methods"])


def test_effect_of_single_runs(static_run, full_run, data, tables_of):
    """Runs are compared by their scores on the whole test split, as `fastmask evaluate` has them."""
    found = tables_of([static_run, full_run], "effect")["effect"].set_index("language")
    for language in LANGUAGES:
        las = {}
        for name, run in (("static", static_run), ("full", full_run)):
            task = attached_task(run)
            examples = task.examples(load_treebanks(data, language)[language]["test"])
            las[name] = task.scored(examples, language if name == "static" else None)["las"]
        assert found.difference[language] == pytest.approx(las["static"] - las["full"])
        assert found.verdict[language] == "too few"


def test_typology(comparison, data, tables_of):
    """A gain is set against the similarity of that language, of these sentences."""
    found = tables_of([comparison], "typology")
    unseen = ["qad", "qag", "qah"]
    loaded = load_treebanks(data, [*LANGUAGES, *unseen])
    profile = {
        name: direction_profile([row for split in splits.values() for row in split]) for name, splits in loaded.items()
    }
    near = {
        name: direction_similarity(profile[name], {other: profile[other] for other in LANGUAGES}) for name in unseen
    }
    gains = {
        name: [
            las_by_hand(comparison, "static", "adapted", seed)[name]
            - las_by_hand(comparison, "full", "adapted", seed)[name]
            for seed in (0, 1)
        ]
        for name in unseen
    }
    wanted = fm.analysis.typology(gains, near, seed=3)
    same(found["typology-static-head-direction"], wanted.table)
    every = found["typology-static-head-direction_every-correlation"].set_index("condition")
    assert list(every.index) == ["zero-shot", "chosen", "adapted"]
    assert every.p["adapted"] == pytest.approx(wanted.more["correlation"].p[0], nan_ok=True)


def test_torch_is_left_alone(static_run, tmp_path):
    """A report made in this process leaves the number of threads as it was."""
    before = torch.get_num_threads()
    make_report([static_run], ["overlap"], tmp_path / "out", OPTIONS)
    assert torch.get_num_threads() == before
