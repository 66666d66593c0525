"""`fastmask adapt`: a language the run was not trained on, from a handful of sentences, as a run of its own."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fastmask.files import check_writable
from fastmask.literal import say
from fastmask.terminal import console_of
from fastmask.training.config import ConfigError

if TYPE_CHECKING:
    from fastmask.tasks.parsing.evaluation import Evaluation, Prepared
    from fastmask.tasks.parsing.parser import Parser
    from fastmask.training.finished import FinishedRun
    from fastmask.unseen import Choice

__all__ = ["add_options", "run"]

Rows = list[Mapping[str, Any]]
Score = tuple[str, int, "Evaluation"]  # which network, after how many steps, what the scorer says


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options, but for RUN and where to compute."""
    from fastmask.unseen import CHOICES, DEFAULT_RATES, DEFAULT_STEPS, OPTIMIZERS
    from fastmask.unseen.support import UNKNOWN_DEPRELS
    from fastmask.unseen.typology import SIMILARITIES

    heads, below = (", ".join(f"{rates[i]:g} for {name}" for name, rates in DEFAULT_RATES.items()) for i in (0, 1))
    add = parser.add_argument
    add("--language", required=True, metavar="CODE", help="what the unseen language is called")
    add("--support", metavar="FILE", help="CoNLL-U file of support sentences; zero-shot if not given")
    add("--sentences", type=int, metavar="N", help="so many of them, drawn by the seed; all of them if not given")
    add(
        "--choose",
        choices=CHOICES,
        help="which subnetwork (default: nearest; full for a run without subnetworks)",
    )
    add("--similarity", choices=SIMILARITIES, help="what nearest means (default: uriel where lang2vec is installed)")
    add("--steps", type=int, metavar="K", help=f"gradient steps, each on all of them (default: {DEFAULT_STEPS})")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="that takes the steps")
    add("--lr", type=float, metavar="X", help=f"learning rate of arc and label scores (default: {heads})")
    add(
        "--encoder-lr",
        type=float,
        metavar="X",
        help=f"learning rate of all that is below them (default: {below}; a pretrained one takes less)",
    )
    add("--unknown-deprels", choices=UNKNOWN_DEPRELS, default="fail", help="what to do with relations new to the model")
    test = parser.add_mutually_exclusive_group()
    test.add_argument("--test", metavar="FILE", help="CoNLL-U file to score before and after")
    test.add_argument("--data", metavar="DIR", help="or a UD treebank, or a folder of them: its test split")
    add("--seed", type=int, default=0, help="of the draw of support sentences")
    add("--out", required=True, metavar="DIR", help="folder of the new run")


def run(options: argparse.Namespace) -> None:
    """Choose a subnetwork, adapt, score before and after where there is a test, and save a run."""
    from fastmask.tasks.parsing.windows import rows_that_fit
    from fastmask.training.adaptations import adaptations_of, check_new, check_new_folder, held_for_new
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run
    from fastmask.unseen import check_deprels

    # What can be wrong with what was given is found before anything is computed or written.
    out = check_new_folder(options.out)
    check_writable(out / "model")
    loaded = load_run(options.run, attached=False)
    parser, earlier = loaded.parser, adaptations_of(options.run)
    check_new(options.language, loaded, earlier)
    how, steps = _defaults(options, loaded)
    rows = check_deprels(_support(options), parser.vocabulary, options.unknown_deprels)
    support = parser.features.encode(rows, parser.vocabulary)
    fits = rows_that_fit(parser.features, support, "support sentences")
    support, rows = support.select(fits), [rows[row] for row in fits.tolist()]
    test = _test(options, parser, rows)
    parser.to(device_of(options.device))
    with held_for_new(out):
        _adapt(options, out, loaded, how, steps, rows, support, test, earlier)


def _adapt(
    options: argparse.Namespace,
    out: Path,
    loaded: FinishedRun,
    how: str,
    steps: int,
    rows: Rows,
    support: Any,
    test: Prepared | None,
    earlier: list[dict[str, Any]],
) -> None:
    from fastmask.training.adaptations import save_adapted
    from fastmask.unseen import DEFAULT_RATES, HeadDirection, adapted

    parser = loaded.parser
    choice, by = _choose(options, how, loaded, rows, support, earlier)
    _print_choice(choice, options.language, by)
    networks = dict.fromkeys([-1, choice.language_id])
    scores = [(_network(choice, number), 0, _score(parser, test, number)) for number in networks] if test else []
    head_lr, encoder_lr = DEFAULT_RATES[options.optimizer]
    how_fast = {
        "head_lr": head_lr if options.lr is None else options.lr,
        "encoder_lr": encoder_lr if options.encoder_lr is None else options.encoder_lr,
        "optimizer": options.optimizer,
    }
    with adapted(parser, support, choice.language_id, steps=steps, keep=True, **how_fast) as losses:
        pass
    if steps:
        say(f"training loss {losses[0]:.3f} before the first of {steps} steps, {losses[-1]:.3f} before the last")
        if losses[-1] > losses[0]:
            print("it rose: lower --lr and --encoder-lr", file=sys.stderr)
        if test:
            scores.append((_network(choice, choice.language_id), steps, _score(parser, test, choice.language_id)))
    _print_scores(scores)

    record = {
        "language": options.language,
        "from": os.fspath(options.run),
        "support": options.support,
        "sent_ids": [row["sent_id"] for row in rows],
        "seed": options.seed,
        "choice": {"how": how, "by": by, **dataclasses.asdict(choice)},
        "steps": steps,
        **how_fast,
        "support_losses": losses.tolist(),
        "scores": [
            {"network": name, "steps": taken, "las": found.las, "uas": found.uas, "words": found.scores.words}
            for name, taken, found in scores
        ],
    }
    save_adapted(out, loaded, choice, record, earlier, HeadDirection.of_rows(rows))
    say(f"run: {out.resolve()}")


def _defaults(options: argparse.Namespace, loaded: FinishedRun) -> tuple[str, int]:
    """How to choose, and the number of steps."""
    from fastmask.unseen import DEFAULT_STEPS

    if options.support is None and (options.steps or options.sentences):
        raise ConfigError("steps and sentences are of support sentences (expected --support FILE, too)")
    if options.steps is not None and options.steps < 0:
        raise ConfigError(f"steps is {options.steps} (expected at least 0)")
    if options.sentences is not None and options.sentences < 1:
        raise ConfigError(f"sentences is {options.sentences} (expected at least 1)")
    if options.seed < 0:
        raise ConfigError(f"seed is {options.seed} (expected at least 0)")
    steps = 0 if options.support is None else DEFAULT_STEPS if options.steps is None else options.steps
    if loaded.subnetworks is None:
        if options.choose not in (None, "full"):
            raise ConfigError(f"choose is {options.choose!r}, but {options.run} has no subnetworks (expected full)")
        return "full", steps
    # Not "best": losses of subnetworks that are more or less sure of themselves do not compare well.
    return options.choose or "nearest", steps


def _support(options: argparse.Namespace) -> Rows:
    """The support sentences: all of the file, or as many as asked, drawn by the seed, in the file's order."""
    from fastmask.unseen import support_sets

    if options.support is None:
        return []
    rows = _read(options.support)
    if options.sentences is None:
        return rows
    if len(rows) < options.sentences:
        raise ConfigError(f"{options.support} has {len(rows)} sentences (expected {options.sentences}, as asked)")
    drawn = support_sets(len(rows), options.sentences, 1, options.seed, options.language)[0]
    return [rows[row] for row in sorted(drawn.tolist())]


def _test(options: argparse.Namespace, parser: Parser, support: Rows) -> Prepared | None:
    """The test sentences, without those whose words are those of a support sentence; None if no test was given."""
    from fastmask.tasks.data.treebanks import load_treebanks
    from fastmask.tasks.parsing.evaluation import prepare
    from fastmask.unseen.support import without_repeats

    if options.test:
        rows = _read(options.test)
    elif options.data:
        (splits,) = load_treebanks(options.data, [options.language], splits=("test",)).values()
        rows = list(splits["test"])
    else:
        return None
    left = without_repeats(rows, support)
    if len(left) < len(rows):
        say(f"{len(rows) - len(left)} test sentences are left out: they stand in the support set, too", file=sys.stderr)
    if not left:
        raise ConfigError("every test sentence is also a support sentence (expected others)")
    return prepare(parser, left)


def _read(path: str) -> Rows:
    from fastmask.tasks.data.conllu import read_sentences

    return [dataclasses.asdict(sentence) for sentence in read_sentences(path)]


def _choose(
    options: argparse.Namespace,
    how: str,
    loaded: FinishedRun,
    rows: Rows,
    support: Any,
    earlier: list[dict[str, Any]],
) -> tuple[Choice, str | None]:
    """Attach the subnetworks and choose one; and by which similarity the nearest one was found."""
    from fastmask.models import attach
    from fastmask.training.adaptations import profiles_of
    from fastmask.unseen import HeadDirection, choose, with_union
    from fastmask.unseen.choosing import FULL_CHOICE
    from fastmask.unseen.typology import head_direction_similarity, similarity_measure, uriel_similarity

    subnets = loaded.subnetworks
    if subnets is None:
        return FULL_CHOICE, None
    by, similarity = None, None
    if how == "nearest":
        by = similarity_measure(options.language, subnets.languages, bool(rows), options.similarity)
        if by == "uriel":
            similarity = uriel_similarity(options.language, subnets.languages)
        else:
            profiles = profiles_of(loaded, options.run, earlier)
            similarity = head_direction_similarity(HeadDirection.of_rows(rows), profiles)
    if how == "union":
        subnets = with_union(subnets)
    attach(loaded.parser.encoder, subnets)
    return choose(loaded.parser, subnets, support, how, similarity=similarity), by


def _score(parser: Parser, test: Prepared, number: int) -> Evaluation:
    from fastmask.tasks.parsing.evaluation import evaluate

    return evaluate(parser, {"test": test}, number)["test"]


def _network(choice: Choice, number: int) -> str:
    return "full network" if number < 0 else f"subnetwork {choice.name}"


def _print_choice(choice: Choice, language: str, by: str | None) -> None:
    """The table of candidates, best first, or one line where nothing was compared."""
    values = choice.losses or choice.similarities
    if values is None:
        say(f"{language}: {_network(choice, choice.language_id)}")
        return
    table = Table(title=f"which subnetwork for {language}")
    table.add_column("subnetwork")
    table.add_column("support loss" if choice.losses else f"similarity ({by})", justify="right")
    table.add_column("")
    for name, value in sorted(values.items(), key=lambda item: item[1], reverse=choice.losses is None):
        table.add_row(name, f"{value:.4f}", "chosen" if name == choice.name else "")
    _print(table)


def _print_scores(scores: list[Score]) -> None:
    if not scores:
        return
    table = Table(title=f"official LAS / UAS on {scores[0][2].scores.words} words, percent")
    for name in ("network", "steps", "LAS", "UAS"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name, steps, found in scores:
        table.add_row(name, str(steps), f"{found.las:.2f}", f"{found.uas:.2f}")
    _print(table)


def _print(table: Table) -> None:
    console_of(sys.stdout).print(table)
