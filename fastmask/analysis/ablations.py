"""Ablation: what a subnetwork loses without one of its heads, and gains with one more; does the score foresee it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fastmask.analysis.all_units import all_gate_gradients, all_units_computed
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, SIGNED, bare, heatmap, legend_above, new_figure
from fastmask.analysis.result import Result, span
from fastmask.analysis.statistics import spearman_permutation
from fastmask.discovery.gates import frozen, gated, probes_of
from fastmask.errors import unknown
from fastmask.models.attach import attached, language

__all__ = ["ablation"]

GROUPS = {"owned": True, "not owned": False}
CELLS = 400  # columns of the grid up to which one cell can be told from the next


def ablation(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    units: str = "heads",
    whole: nn.Module | None = None,
    seed: int = 0,
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

    One forward pass for each unit, language and batch.

    Args:
        model: a Hugging Face model with subnetworks over `units` attached.
        loss: runs the model on a batch, once -> one number for each example, [B], lower is better. Without
            `language_ids`: it is called inside `fastmask.language`.
        batches: by language.
        units: "heads" or "neurons".
        whole: what else runs in `loss` and must be in eval mode, such as the parser that `model` is the encoder of.
        seed: of the correlations' permutation tests.

    Returns:
        table: `language`, `layer`, `unit`, `owned`, `change`, `error` (its standard error over examples), `worth`,
            `score`, `predicted`.
        more["agreement"]: `language`, `group` ("owned", "not owned"), `n` units, `score_rho`, `score_p`,
            `predicted_rho`, `predicted_p`; the language "all" has the mean over languages.

    Raises:
        KeyError: a language without a subnetwork, an unknown kind of unit.
        ValueError: units that are not masked, a language without batches, a loss of another shape.
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
    examples = []
    with frozen(model if whole is None else whole):
        for name, given in data.items():
            owned = keep[subnets.index(name)].cpu().numpy()
            score, predicted = _scores(model, name, given, loss, units, owned)
            with torch.no_grad(), language(model, name):
                base = torch.cat([loss(batch) for batch in given]).double()
            n = len(base)
            examples.append(n)
            for (layer, unit), own in np.ndenumerate(owned):
                change = _flipped(model, name, units, layer, unit, given, loss).double() - base
                mean = float(change.mean())
                error = float(change.std()) / n**0.5 if n > 1 else np.nan
                values = (mean, error, mean if own else -mean, score[layer, unit], predicted[layer, unit])
                rows.append((name, layer, unit, bool(own), *values))
    columns = ["language", "layer", "unit", "owned", "change", "error", "worth", "score", "predicted"]
    table = pd.DataFrame(rows, columns=columns)
    agreement = _agreement(table, list(data), seed)
    caption = (
        f"Each of {keep[0].numel()} {units} flipped alone in the subnetwork of each of {len(data)} languages; "
        f"{span(examples)} examples each. Worth: how much lower the mean loss is with the {units.removesuffix('s')}; a "
        "dot marks those that the language does not own. Middle: Spearman correlation, over a language's units, of the "
        "worth with the importance score, among owned and not owned units. Right: all of them. A score that finds the "
        "units a language needs correlates with their worth; a correlation near 0 says that it ranks them at random."
    )
    shape = (int(keep.shape[1]), int(keep.shape[2]))
    return Result("ablation", table, caption, lambda: _draw(table, agreement, units, shape), {"agreement": agreement})


def _flipped(
    model: nn.Module,
    name: str,
    units: str,
    layer: int,
    unit: int,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
) -> Tensor:
    """Loss of each example with one unit of a language's subnetwork removed if owned, given if not."""
    subnets, probes = attached(model).subnets, probes_of(model)
    gates = []
    for probe in probes:
        gate = getattr(subnets, probe.kind)[subnets.index(name), probe.layer, : probe.units].clone()
        if (probe.kind, probe.layer) == (units, layer) and unit < probe.units:
            gate[unit] ^= True
        gates.append(gate)
    with torch.no_grad(), language(model, name), all_units_computed(model), gated(model, probes, gates):
        return torch.cat([loss(batch) for batch in batches])


def _scores(
    model: nn.Module, name: str, batches: Sequence[Any], loss: Callable[[Any], Tensor], units: str, owned: Any
) -> tuple[Any, Any]:
    """Importance and first-order worth of every unit, [layers, units]."""
    seen = [all_gate_gradients(model, name, batch, loss) for batch in batches]
    examples = sum(one.examples for one in seen)
    score, signed = (sum(getattr(one, kind)[units].numpy() for one in seen) for kind in ("absolute", "signed"))
    score = score / examples
    norm = np.sqrt((np.where(owned, score, 0) ** 2).sum(1, keepdims=True))
    return score / np.maximum(norm, np.finfo(np.float64).tiny), -signed / examples


def _agreement(table: pd.DataFrame, languages: Sequence[str], seed: int) -> pd.DataFrame:
    rows = []
    for place, name in enumerate(languages):
        for group, owned in GROUPS.items():
            mine = table[(table.language == name) & (table.owned == owned)]
            found: list[float] = []
            for number, column in enumerate(("score", "predicted")):
                where = [seed, place, int(owned), number]
                enough = len(mine) > 1
                found += spearman_permutation(mine[column], mine.worth, seed=where) if enough else (np.nan, np.nan)
            rows.append((name, group, len(mine), *found))
    columns = ["language", "group", "n", "score_rho", "score_p", "predicted_rho", "predicted_p"]
    result = pd.DataFrame(rows, columns=columns)
    means = result.groupby("group", sort=False)[["n", "score_rho", "predicted_rho"]].mean().reset_index()
    return pd.concat([result, means.assign(language="all")], ignore_index=True)


def _draw(table: pd.DataFrame, agreement: pd.DataFrame, units: str, shape: tuple[int, int]) -> Any:
    languages = list(dict.fromkeys(table.language))
    layers, size = shape
    n, columns = len(languages), layers * size
    wide = max(4.0, 0.13 * columns) if columns <= CELLS else 0.0
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
            grid.axvline(layer * size - 0.5, color=GREY, linewidth=0.8)
        grid.set_xticks([layer * size + (size - 1) / 2 for layer in range(layers)], range(layers), rotation=0)
        grid.set_xlabel(f"layer; within it, {units}")
        figure.colorbar(image, ax=grid, label="worth (loss)", extend="both", pad=0.01)
    middle, right = panels[-2:]
    for at, (group, owned) in enumerate(GROUPS.items()):
        style = {"color": COLOURS[at], "label": group}
        rho = agreement[(agreement.group == group) & (agreement.language != "all")].set_index("language")
        middle.plot(rho.score_rho.loc[languages], range(n), MARKERS[at], markersize=4, **style)
        mine = table[table.owned == owned]
        right.plot(mine.score, mine.worth, MARKERS[at], markersize=2.5, alpha=0.6, **style)
    middle.axvline(0, color=GREY, linewidth=0.8)
    middle.set_yticks(range(n), languages if not wide else [""] * n)
    middle.set(ylim=(n - 0.5, -0.5), xlim=(-1.05, 1.05), xlabel="correlation of worth and score")
    legend_above(middle)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(xlabel="importance score", ylabel="worth (loss)")
    bare(middle, right)
    return figure
