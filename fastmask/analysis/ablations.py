"""Ablation: what a subnetwork loses without one of its heads, and gains with one more; does the score foresee it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, SIGNED, bare, heatmap, legend_above, new_figure
from fastmask.analysis.result import Result, kind_of, span
from fastmask.analysis.statistics import spearman_permutation
from fastmask.discovery.gates import Gates, Probe, frozen, gate_gradients, gated, probes_of
from fastmask.models.attach import attached, language

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

    Every unit is computed and multiplied by a gate, 1 where the language owns it and 0 where not: dead units have a
    score, too. One forward pass for each unit, language and batch.

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
        KeyError: a language without a subnetwork, units that are not masked.
        ValueError: masks over single weights beside them (the full network is run, where these are not in force), a
            language without batches, a loss of another shape.
        FloatingPointError: a loss or a gradient that is not finite.
    """
    subnets = attached(model).subnets
    keep = getattr(subnets, kind_of(subnets, units))
    data = {name: list(given) for name, given in batches.items()}
    for name, given in data.items():
        subnets.index(name)
        if not given:
            raise ValueError(f"no batch of language {name!r}")
    if subnets.weights is not None:
        raise ValueError(
            f"masks over single weights beside those over {units} would not be in force while every unit is computed "
            "(expected masks over heads and neurons alone)"
        )
    probes = probes_of(model)
    places = [(probe.kind, probe.layer, unit) for probe in probes for unit in range(probe.units)]
    rows: list[tuple[Any, ...]] = []
    examples = []
    with (
        frozen(model if whole is None else whole),
        torch.compiler.set_stance("force_eager"),  # a compiled model would be compiled again for the gates
    ):
        for name, given in data.items():
            row = subnets.index(name)
            alive = torch.cat([subnets.units[probe.kind][row, probe.layer, : probe.units] for probe in probes])
            owned = alive.tolist()
            each = alive.split([probe.units for probe in probes])  # which each pass reads
            # All units are computed: in the full network, which is the language's own where it owns all of them, with
            # what else it has (a vector, say).
            with language(model, name if all(owned) else None), gated(model, probes, each) as gates:
                absolute, signed = _scores(name, given, loss, probes, gates)
                base = _losses(given, loss, gates)
                examples.append(n := len(base))
                for place, (kind, layer, unit) in enumerate(places):
                    if kind == units:
                        alive[place] ^= True
                        change = _losses(given, loss, gates) - base
                        alive[place] ^= True
                        error = float(change.std()) / n**0.5 if n > 1 else np.nan
                        numbers = float(change.mean()), error, absolute[place], -signed[place]
                        rows.append((name, layer, unit, owned[place], *numbers))
    columns = ["language", "layer", "unit", "owned", "change", "error", "score", "predicted"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(columns.index("score"), "worth", np.where(table.owned, table.change, -table.change))
    norms = (table.score * table.owned).pow(2).groupby([table.language, table.layer]).transform("sum").pow(0.5)
    table["score"] /= norms.clip(lower=np.finfo(np.float64).tiny)
    agreement = _agreement(table, list(data), seed)
    caption = (
        f"Each of {len(table) // len(data)} {units} flipped alone in the subnetwork of each of {len(data)} languages; "
        f"{span(examples)} examples each. Worth: how much lower the mean loss is with the {units.removesuffix('s')}; a "
        "dot marks those that the language does not own. Middle: Spearman correlation, over a language's units, of the "
        "worth with the importance score, among owned and not owned units. Right: all of them. A score that finds the "
        "units a language needs correlates with their worth; a correlation near 0 says that it ranks them at random."
    )
    shape = (int(keep.shape[1]), int(keep.shape[2]))
    return Result("ablation", table, caption, lambda: _draw(table, agreement, units, shape), {"agreement": agreement})


@torch.no_grad()
def _losses(batches: Sequence[Any], loss: Callable[[Any], Tensor], gates: Gates) -> Tensor:
    """The loss of every example, float64 [n], by the gates as they are now."""
    found = []
    for batch in batches:
        gates.clear()
        found.append(loss(batch))
    return torch.cat(found).double()


def _scores(
    name: str, batches: Sequence[Any], loss: Callable[[Any], Tensor], probes: Sequence[Probe], gates: Gates
) -> NDArray[np.float64]:
    """Means over examples of |dL / d gate| and of dL / d gate, [2, units of all probes]."""
    seen = []
    for batch in batches:
        gates.clear()
        with torch.enable_grad():
            losses = loss(batch)
        seen.append(torch.cat(gate_gradients(losses, gates, probes), 1).double())
    grads = torch.cat(seen)
    if not bool(grads.isfinite().all()):
        raise FloatingPointError(f"scoring {name!r}: the loss or a gradient of it is not finite")
    return torch.stack([grads.abs().mean(0), grads.mean(0)]).cpu().numpy()


def _agreement(table: pd.DataFrame, languages: Sequence[str], seed: int) -> pd.DataFrame:
    rows = []
    for place, name in enumerate(languages):
        for group, owned in GROUPS.items():
            mine = table[(table.language == name) & (table.owned == owned)]
            found: list[float] = []
            for number, column in enumerate(("score", "predicted")):
                where = [seed, place, int(owned), number]
                found += spearman_permutation(mine[column], mine.worth, seed=where) if len(mine) else (np.nan, np.nan)
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
        places = table.language.map(languages.index), table.layer * size + table.unit  # a layer may have fewer units
        worth = np.full((n, columns), np.nan)
        worth[places] = table.worth
        most = float(np.nanquantile(np.abs(worth), 0.98)) or 1.0
        image = heatmap(grid, worth, languages, [""] * columns, colours=SIGNED, low=-most, high=most, numbers=None)
        row, column = (place[~table.owned] for place in places)
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
