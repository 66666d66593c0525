"""`fastmask adapt`: a language the run was not trained on, from a handful of sentences, as a run of its own."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastmask import unseen
from fastmask.cli.options import DATA, FILE, RUN, add_device
from fastmask.cli.report import print_table
from fastmask.errors import unknown
from fastmask.files import check_writable
from fastmask.models import attach
from fastmask.settings import ConfigError
from fastmask.tasks.data.language_codes import same_language
from fastmask.tasks.task import UNKNOWN_LABELS, Task, heading, warn_of_pooling
from fastmask.training.engine import ADAMW_RATE, device_of, inner_rates
from fastmask.training.run_folder import FinishedRun, load_run
from fastmask.unseen.adapted_run import adaptations_of, check_new, check_new_folder, profiles_of, save_adapted
from fastmask.unseen.adapting import without_repeats
from fastmask.unseen.choosing import FULL_CHOICE, Choice
from fastmask.unseen.typology import SIMILARITIES

Rows = list[Mapping[str, Any]]


def add_adapt(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    inner = "default: that of the run's inner steps"
    add = parser.add_argument
    add("run", metavar="RUN", type=RUN, help="folder of a finished run")
    add("--language", required=True, metavar="CODE", help="name of the unseen language")
    add("--support", metavar="FILE", type=FILE, help="support examples (parsing: CoNLL-U); zero-shot if not given")
    add("--sentences", type=int, metavar="N", help="number of support examples to draw; all of them if not given")
    usual = "nearest, or best where examples have no trees; full for a run without any"
    which = f"how to choose a subnetwork (default: {usual})"
    add("--choose", choices=unseen.CHOICES, help=which)
    similarity = "measure of similarity for nearest (default: uriel where lang2vec is installed)"
    add("--similarity", choices=SIMILARITIES, help=similarity)
    steps = f"gradient steps, each on all support examples ({inner})"
    add("--steps", type=int, metavar="K", help=steps)
    add("--optimizer", choices=tuple(unseen.OPTIMIZERS), default="sgd", help="optimizer for these steps")
    add("--lr", type=float, metavar="X", help=f"learning rate outside the encoder ({inner}; {ADAMW_RATE:g} for adamw)")
    rate = f"learning rate of the encoder ({inner}; {ADAMW_RATE:g} for adamw)"
    add("--encoder-lr", type=float, metavar="X", help=rate)
    add("--unknown-labels", choices=UNKNOWN_LABELS, default="fail", help="what to do with labels new to the model")
    test = parser.add_mutually_exclusive_group()
    test.add_argument("--test", metavar="FILE", type=FILE, help="file to score before and after")
    test.add_argument("--data", metavar="DIR", type=DATA, help="data that has the language; scores its test split")
    add("--seed", type=int, default=0, help="seed for drawing support examples")
    add("--out", required=True, metavar="DIR", help="folder of the new run")
    add_device(parser)


def run_adapt(options: argparse.Namespace) -> None:
    """Choose a subnetwork, adapt, score before and after where there is a test, and save a run."""
    # What can be wrong with what was given is found before anything is computed or written.
    out = check_new_folder(options.out)
    check_writable(out / "model")
    loaded = load_run(options.run, attached=False)
    task, earlier = loaded.task, adaptations_of(options.run)
    check_new(options.language, loaded, earlier)
    how, how_fast = _defaults(options, loaded)
    steps = how_fast["steps"]
    rows = task.known_labels(_support(options, loaded), options.unknown_labels)
    support = None if options.support is None else task.training_examples(rows, options.language, "support")
    asked = options.choose or options.similarity
    if asked is None and how == "nearest" and rows and task.profile(rows) is None:
        how = "best"  # without trees only URIEL knows what is near, and that may not be there
    test = _test(options, loaded, rows)
    task.model.to(device_of(options.device))

    choice, by = _choose(options, how, loaded, rows, support, earlier)
    print_choice(choice, options.language, by)
    scores: list[dict[str, Any]] = []

    def score(network: Choice, taken: int) -> None:
        if test is not None:
            found = task.scored(test, None if network.language_id < 0 else network.name)
            size = {"examples": len(test), "words": int(test.lengths.sum())}
            scores.append({"network": _called(network), "steps": taken, **found, **size})

    for network in {each.language_id: each for each in (FULL_CHOICE, choice)}.values():
        score(network, 0)
    if steps and choice.language_id != FULL_CHOICE.language_id and test is not None:
        # The control: what the same steps bring without a subnetwork. It is undone.
        with unseen.adapted(task, support, FULL_CHOICE.language_id, **how_fast):
            score(FULL_CHOICE, steps)
    with unseen.adapted(task, support, choice.language_id, keep=True, **how_fast) as losses:
        pass
    if steps:
        print(f"training loss {losses[0]:.3f} before the first of {steps} steps, {losses[-1]:.3f} before the last")
        if losses[-1] > losses[0]:
            print("the loss rose: lower --lr and --encoder-lr", file=sys.stderr)
        score(choice, steps)
    _print_scores(scores, task)

    record = {
        "language": options.language,
        "from": os.fspath(options.run),
        "support": options.support,
        "sent_ids": [row.get("sent_id") for row in rows],
        "seed": options.seed,
        "choice": {"how": how, "by": by, **dataclasses.asdict(choice)},
        **how_fast,
        "support_losses": losses.tolist(),
        "scores": scores,
    }
    task.add_language(choice.language_id)
    save_adapted(out, loaded, choice, record, earlier, task.profile(rows))
    print(f"run: {out.resolve()}")


def _defaults(options: argparse.Namespace, loaded: FinishedRun) -> tuple[str, dict[str, Any]]:
    """How to choose, and how to adapt: like the inner steps of the run."""
    of_support = ("steps", "sentences", "lr", "encoder_lr")
    if options.support is None and (useless := [name for name in of_support if getattr(options, name)]):
        option = useless[0].replace("_", "-")
        raise ConfigError(f"--{option} needs support examples (expected --support FILE)")
    for name, least in (("steps", 0), ("sentences", 1), ("seed", 0), ("lr", 0), ("encoder_lr", 0)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} is {value} (expected at least {least})")
    config = loaded.config
    usual = config.inner_steps, *inner_rates(loaded.task, config, options.optimizer)
    given = (0 if options.support is None else options.steps, options.lr, options.encoder_lr)
    steps, head_lr, encoder_lr = (mine if own is None else own for own, mine in zip(given, usual, strict=True))
    how_fast = {"steps": steps, "head_lr": head_lr, "encoder_lr": encoder_lr, "optimizer": options.optimizer}
    if options.similarity is not None and (loaded.subnetworks is None or options.choose not in (None, "nearest")):
        raise ConfigError(f"similarity is {options.similarity!r}, which only choose nearest reads (expected none)")
    if loaded.subnetworks is None:
        if options.choose not in (None, "full"):
            raise ConfigError(f"choose is {options.choose!r}, but {options.run} has no subnetworks (expected full)")
        return "full", how_fast
    # Not "best": losses of subnetworks that are more or less sure of themselves do not compare well.
    return options.choose or "nearest", how_fast


def _support(options: argparse.Namespace, loaded: FinishedRun) -> Rows:
    """The support examples: all of the file, or as many as asked, drawn by the seed, in the file's order."""
    if options.support is None:
        return []
    rows = _read(options.support, options, loaded)
    if options.sentences is None:
        return rows
    if len(rows) < options.sentences:
        word = loaded.task.example_word
        raise ConfigError(f"{options.support} has {len(rows)} {word} (expected {options.sentences}, as asked)")
    drawn = unseen.support_sets(len(rows), options.sentences, 1, options.seed, options.language)[0]
    return [rows[row] for row in sorted(drawn.tolist())]


def _read(file: str, options: argparse.Namespace, loaded: FinishedRun) -> Rows:
    """The rows of a file; of one whose rows name several languages, those of the language that is asked for."""
    settings = loaded.config.task_settings
    rows = list(loaded.task.read(file, settings))
    names = [row.get(settings.language_column) for row in rows]
    known = {str(name) for name in names if name is not None}
    if len(known) < 2:
        return rows
    own = same_language(options.language, known)
    if own is None:
        raise ConfigError(f"{file}: {unknown('language', options.language, known)}")
    found = [row for row, name in zip(rows, names, strict=True) if name is not None and str(name) == own]
    print(f"{file}: {len(rows) - len(found)} rows of other languages are left out", file=sys.stderr)
    return found


def _test(options: argparse.Namespace, loaded: FinishedRun, support: Rows) -> Any:
    """The test examples, without those that stand in the support set; None if no test was given."""
    task, settings = loaded.task, loaded.config.task_settings
    if options.test:
        rows = _read(options.test, options, loaded)
    elif options.data:
        (splits,) = task.load(options.data, [options.language], settings, splits=("test",)).values()
        rows = list(splits["test"])
    else:
        return None
    warn_of_pooling(options.language, rows)
    left, word = without_repeats(rows, support, partial(task.words_of, options=settings)), task.example_word
    if len(left) < len(rows):
        print(f"{len(rows) - len(left)} test {word} are left out: they are also in the support set", file=sys.stderr)
    if not left:
        one = word.rstrip("s")
        raise ConfigError(f"every test {one} is also a support {one} (expected others)")
    return task.examples(left)


def _choose(
    options: argparse.Namespace, how: str, loaded: FinishedRun, rows: Rows, support: Any, earlier: list[dict[str, Any]]
) -> tuple[Choice, str | None]:
    """Attach the subnetworks and choose one; and by which similarity the nearest one was found."""
    subnets, task = loaded.subnetworks, loaded.task
    if subnets is None:
        return FULL_CHOICE, None
    by, similarity = None, None
    if how == "nearest":
        profile = task.profile(rows) if rows else None
        by = unseen.similarity_measure(options.language, subnets.languages, profile is not None, options.similarity)
        if by == "uriel":
            similarity = unseen.uriel_similarity(options.language, subnets.languages)
        else:
            assert profile is not None
            similarity = task.similarity(profile, profiles_of(loaded, options.run, earlier))
    if how == "union":
        subnets = unseen.with_union(subnets)
    attach(task.encoder, subnets)
    return unseen.choose(task, subnets, support, how, similarity=similarity), by


def _called(choice: Choice) -> str:
    return "full network" if choice.language_id < 0 else f"subnetwork {choice.name}"


def print_choice(choice: Choice, language: str, by: str | None) -> None:
    """The table of candidates, best first, or one line where nothing was compared."""
    values = choice.losses or choice.similarities
    if values is None:
        print(f"{language}: {_called(choice)}")
        return
    by = "support loss" if choice.losses else f"similarity ({by})"
    best_first = sorted(values.items(), key=lambda item: item[1], reverse=choice.losses is None)
    rows = [
        {"subnetwork": name, by: f"{value:.4f}", "": "chosen" if name == choice.name else ""}
        for name, value in best_first
    ]
    print_table(f"which subnetwork for {language}", rows, sys.stdout)


def _print_scores(scores: list[dict[str, Any]], task: Task) -> None:
    if not scores:
        return
    names = [name for name in scores[0] if name not in ("network", "steps", "examples", "words")]
    rows = [
        {"network": row["network"], "steps": str(row["steps"]), **{heading(name): f"{row[name]:.2f}" for name in names}}
        for row in scores
    ]
    on, unit = f"{scores[0]['examples']} {task.example_word}", ", percent" if task.percent else ""
    print_table(f"{' / '.join(map(heading, names))} on {on}{unit}", rows, sys.stdout)
