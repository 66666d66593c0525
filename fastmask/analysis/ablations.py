"""Ablation: what a subnetwork loses without one of its heads, and gains with one more; does the score foresee it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, SIGNED, heatmap, new_figure
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import spearman_permutation
from fastmask.analysis.variants import flipped_losses, repeated
from fastmask.discovery.gates import frozen
from fastmask.dynamic.scout import scout
from fastmask.errors import unknown
from fastmask.models.attach import attached, language

__all__ = ["ablation"]


def ablation(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    units: str = "heads",
    whole: nn.Module | None = None,
    repeat: Callable[[Any, int], Any] = repeated,
    at_once: int = 512,
    seed: int = 0,
    on_layer: Callable[[str, int], None] | None = None,
) -> Result:
    """Change of the loss when one unit is removed from a language's subnetwork, or given to it.

    `change` = mean loss with the unit flipped - mean loss without the flip, over the same examples. A unit's `worth` is
    how much the loss is lower with it: change for a unit that the language owns, -change for one that it does not.

    Agreement: Spearman's correlation, over the units of one language, of the worth with
    - `score`, the importance that pruning goes by: mean over examples of |dL / d gate|, divided by the L2 norm of the
      layer's owned units (Michel et al. 2019), and
    - `predicted`, the first-order estimate of the worth, -mean dL / d gate, which keeps the sign.
    A score that is any good correlates with the worth; how far the worth itself is noise is in `error`. Where a layer
    has one owned unit its score is 1, whatever the unit is worth: with few units left, the score's ranks mean little.

    All units of a layer are flipped in one batch that computes once what they share (`variants`); values equal those of
    one at a time.

    Args:
        model: a Hugging Face model with subnetworks over `units` attached.
        loss: runs the model on a batch, once -> one number for each example, [B], lower is better. Without
            `language_ids`: it is called inside `fastmask.language`.
        batches: by language.
        units: "heads" or "neurons".
        whole: what else runs in `loss` and must be in eval mode, such as the parser that `model` is the encoder of.
        repeat: (batch, n) -> the batch n times, one after the other; default for tensors, and mappings, tuples and
            lists of them, along their first dimension.
        at_once: most examples in a mixed batch, repeats included; always at least one variant.
        seed: of the correlations' permutation tests.
        on_layer: called with the language and layer that were done.

    Returns:
        table: `language`, `layer`, `unit`, `owned`, `change`, `error` (its standard error over examples), `worth`,
            `score`, `predicted`.
        more["agreement"]: `language`, `group` ("owned", "not owned"), `n` units, `score_rho`, `score_p`,
            `predicted_rho`, `predicted_p`; the language "all" has the mean over languages.

    Raises:
        KeyError: a language without a subnetwork, an unknown kind of unit.
        ValueError: units that are not masked, a language without batches, a loss or repeat of another shape.
    """
    subnets = attached(model).subnets
    if units not in ("heads", "neurons"):
        raise unknown("kind of unit", units, ("heads", "neurons"))
    if (keep := getattr(subnets, units)) is None:
        raise ValueError(f"the attached subnetworks do not mask {units}")
    data = {name: list(given) for name, given in batches.items()}
    for name, given in data.items():
        subnets.index(name)
        if not given:
            raise ValueError(f"no batch of language {name!r}")
    rows: list[tuple[Any, ...]] = []
    examples = {}
    with frozen(model if whole is None else whole):
        for name, given in data.items():
            owned = keep[subnets.index(name)].cpu().numpy()
            score, predicted = _scores(model, name, given, loss, units, owned)
            with torch.no_grad(), language(model, name):
                base = [loss(batch) for batch in given]
            sizes = examples[name] = [len(losses) for losses in base]
            for layer in range(keep.shape[1]):
                pieces = [
                    _changes(model, name, units, layer, batch, before, loss, repeat, at_once)
                    for batch, before in zip(given, base, strict=True)
                ]
                differences = np.concatenate(pieces, 1)
                change = differences.mean(1)
                spread = differences.std(1, ddof=1) if sum(sizes) > 1 else np.full_like(change, np.nan)
                worth = np.where(owned[layer], change, -change)
                for unit in range(keep.shape[2]):
                    values = (change[unit], spread[unit] / np.sqrt(sum(sizes)), worth[unit])
                    where = (name, layer, unit, bool(owned[layer, unit]))
                    rows.append((*where, *values, score[layer, unit], predicted[layer, unit]))
                if on_layer is not None:
                    on_layer(name, layer)
    columns = ["language", "layer", "unit", "owned", "change", "error", "worth", "score", "predicted"]
    table = pd.DataFrame(rows, columns=columns)
    agreement = _agreement(table, list(data), seed)
    counts = sorted(sum(sizes) for sizes in examples.values())
    caption = (
        f"Each of {keep[0].numel()} {units} flipped alone in the subnetwork of each of {len(data)} languages; "
        f"{counts[0]}"
        + (f"-{counts[-1]}" if counts[-1] > counts[0] else "")
        + f" examples each. Worth: how much lower the mean loss is with the {units.removesuffix('s')}; a dot marks "
        "those that the language does not own. Middle: Spearman correlation, over a language's units, of the worth "
        "with the importance score, among owned and not owned units. Right: all of them."
    )
    shape = (int(keep.shape[1]), int(keep.shape[2]))
    return Result("ablation", table, caption, lambda: _draw(table, agreement, units, shape), {"agreement": agreement})


def _changes(
    model: nn.Module,
    name: str,
    units: str,
    layer: int,
    batch: Any,
    before: Tensor,
    loss: Callable[[Any], Tensor],
    repeat: Callable[[Any, int], Any],
    at_once: int,
) -> Any:
    """Loss of each example with each unit of a layer flipped, less `before`; float64 [units, B]."""
    B = len(before)
    every = range(getattr(attached(model).subnets, units).shape[2])
    size = max(1, at_once // B)
    found = [
        flipped_losses(model, name, units, layer, list(every[first : first + size]), batch, B, loss, repeat)
        for first in range(0, len(every), size)
    ]
    return (torch.cat(found).double() - before.double()).cpu().numpy()


def _scores(
    model: nn.Module, name: str, batches: Sequence[Any], loss: Callable[[Any], Tensor], units: str, owned: Any
) -> tuple[Any, Any]:
    """Importance and first-order worth of every unit, [layers, units]."""
    absolute, signed = np.zeros(owned.shape), np.zeros(owned.shape)
    examples = 0
    for batch in batches:
        seen = scout(model, name, batch, loss)
        absolute, signed = absolute + seen.absolute[units].numpy(), signed + seen.signed[units].numpy()
        examples += seen.examples
    score = absolute / examples
    norm = np.sqrt((np.where(owned, score, 0) ** 2).sum(1, keepdims=True))
    return score / np.maximum(norm, np.finfo(np.float64).tiny), -signed / examples


def _agreement(table: pd.DataFrame, languages: Sequence[str], seed: int) -> pd.DataFrame:
    rows = []
    for place, name in enumerate(languages):
        for group, owned in (("owned", True), ("not owned", False)):
            mine = table[(table.language == name) & (table.owned == owned)]
            found: list[float] = []
            for number, column in enumerate(("score", "predicted")):
                some = len(mine) > 1
                where = [seed, place, int(owned), number]
                found += spearman_permutation(mine[column], mine.worth, seed=where) if some else (np.nan, np.nan)
            rows.append((name, group, len(mine), *found))
    columns = ["language", "group", "n", "score_rho", "score_p", "predicted_rho", "predicted_p"]
    result = pd.DataFrame(rows, columns=columns)
    means = result.groupby("group", sort=False)[["n", "score_rho", "predicted_rho"]].mean().reset_index()
    return pd.concat([result, means.assign(language="all")], ignore_index=True)


# ---- the picture


def _draw(table: pd.DataFrame, agreement: pd.DataFrame, units: str, shape: tuple[int, int]) -> Any:
    languages = list(dict.fromkeys(table.language))
    layers, size = shape
    n, columns = len(languages), layers * size
    wide = max(4.0, 0.13 * columns) if columns <= 400 else 0.0  # more cells than that nobody can tell apart
    figure = new_figure(wide + 6.2, max(3.0, 0.2 * n + 1.3))
    panels = figure.subplots(1, 3 if wide else 2, width_ratios=[wide, 2.2, 3.0] if wide else [2.2, 3.0])
    if wide:
        grid = panels[0]
        worth = table.worth.to_numpy().reshape(n, columns)
        most = float(np.quantile(np.abs(worth), 0.98)) or 1.0
        image = heatmap(grid, worth, languages, [""] * columns, colours=SIGNED, low=-most, high=most, numbers=None)
        row, column = np.nonzero(~table.owned.to_numpy().reshape(n, columns))
        grid.plot(column, row, ".", color="black", markersize=1.5)
        for layer in range(1, layers):
            grid.axvline(layer * size - 0.5, color="black", linewidth=0.8)
        grid.set_xticks([layer * size + (size - 1) / 2 for layer in range(layers)], range(layers), rotation=0)
        grid.set_xlabel(f"layer; within it, {units}")
        figure.colorbar(image, ax=grid, label="worth (loss)", extend="both", pad=0.01)
    middle, right = panels[-2:]
    for at, (group, owned) in enumerate((("owned", True), ("not owned", False))):
        rho = agreement[(agreement.group == group) & (agreement.language != "all")].set_index("language")
        middle.plot(rho.score_rho.loc[languages], range(n), MARKERS[at], color=COLOURS[at], markersize=4, label=group)
        mine = table[table.owned == owned]
        right.plot(mine.score, mine.worth, MARKERS[at], color=COLOURS[at], markersize=2.5, alpha=0.6, label=group)
    middle.axvline(0, color=GREY, linewidth=0.8)
    middle.set_yticks(range(n), languages if not wide else [""] * n)
    middle.set_ylim(n - 0.5, -0.5)
    middle.set_xlim(-1.05, 1.05)
    middle.set_xlabel("correlation of worth and score")
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_xlabel("importance score")
    right.set_ylabel("worth (loss)")
    for panel in (middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure
