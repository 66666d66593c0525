"""Gradient conflict: do the languages' gradients pull the shared parameters the same way?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fastmask.analysis.drawing import COLOURS, GREY, SIGNED, bare, heatmap, legend_above, new_figure
from fastmask.analysis.gradients import gradients_of, products
from fastmask.analysis.result import Result, span
from fastmask.linear import MaskedLinear
from fastmask.models.attach import attached, is_attached, language, owner_of
from fastmask.models.modes import evaluating
from fastmask.models.structure import layers_of, structure_of

__all__ = ["gradient_conflict"]

PANELS = {"all": "all parameters", "encoder": "encoder", "shared": "weights both own"}


def gradient_conflict(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    whole: nn.Module | None = None,
    full: bool = False,
    layers: Sequence[str] | None = None,
) -> Result:
    """Compare the gradients g_l of the languages' mean losses, pair by pair.

    - cosine: g_i . g_j / (|g_i| |g_j|) (Yu et al. 2020 call a negative one a conflict).
    - conflict: of the coordinates where both gradients are non-zero, the share in which their signs differ; one half
      for gradients that know nothing of each other.
    - conflict_weighted: sum of max(0, -g_i g_j) over sum of |g_i g_j|: the same, each coordinate by its weight in the
      product.

    Over these `scope`s: "all" parameters of `whole`; the "encoder"; each "layer k" of it; and "shared", the weights in
    masked modules that both languages own: there gradients can meet at all (elsewhere in a masked module the product is
    0, but the norms are not).

    The control is the split half: where every language has two batches or more, a_l and b_l are the gradients of its
    even and its odd batches. cos(a_l, b_l) says how far gradients agree that differ by the draw of sentences alone;
    languages conflict where `cosine_halves`, the mean of cos(a_i, b_j) and cos(a_j, b_i), from as many sentences, is
    lower. The cosine of the whole gradients, from twice as many, is not to be compared with it.

    The gradients of all languages are held for some of the parameters at a time (`gradients`), so a large model is run
    several times.

    Args:
        model: a Hugging Face model, attached or not, or any module with `layers`. In eval mode during the call.
        loss: runs the model on a batch -> one loss for each example, [B]. Without `language_ids`: it is called inside
            `fastmask.language`.
        batches: by language; a language's loss is the mean over the examples of all its batches.
        whole: the module whose parameters count, of which `model` is the encoder; default `model`.
        full: run the full network of an attached model, not the subnetworks.
        layers: names of the modules of `model` that are its layers; default those of the model's family.

    Returns:
        table: `scope`, `language_a`, `language_b`, `cosine`, `cosine_halves`, `conflict`, `conflict_weighted`,
            `coordinates` (where both are non-zero). NaN where a gradient is zero, or there are no halves.
        more["languages"]: `scope`, `language`, `examples`, `batches`, `norm`, `split_half` (NaN with one batch).
        more["scopes"]: over pairs: `mean` cosine, `least`, `largest`, share `negative`, mean `conflict`, mean
            `cosine_halves`; over languages: mean `split_half`.

    Raises:
        KeyError: a language without a subnetwork.
        ValueError: fewer than two languages, a language without batches, a loss of another shape.
    """
    names = list(batches)
    data = {name: list(given) for name, given in batches.items()}
    if len(names) < 2:
        raise ValueError(f"gradients conflict between two languages or more, given {names}")
    if empty := [name for name, given in data.items() if not given]:
        raise ValueError(f"no batch of language {empty[0]!r}")
    whole = model if whole is None else whole
    masked = is_attached(model) and not full
    owned = _owned(whole, [attached(model).subnets.index(name) for name in names]) if masked else {}
    sizes: dict[int, int] = {}

    def run(name: str, batch: Any) -> Tensor:
        with language(model, None if full else name) if is_attached(model) else nullcontext(), torch.enable_grad():
            losses = loss(batch)
        if losses.ndim != 1:
            raise ValueError(f"expected one loss for each example, [batch], given shape {tuple(losses.shape)}")
        sizes[id(batch)] = len(losses)
        return losses.sum()

    scopes = _scopes(model, whole, layers)
    sums: dict[str, dict[str, Any]] = {}
    with evaluating(whole):  # dropout would make halves and languages differ by chance
        for name, rows, gradients in gradients_of(whole, run, data):
            found = dict.fromkeys(scopes[name], products(gradients))
            if name in owned:
                found["shared"] = products(gradients, owned[name][:, rows])
            for scope, new in found.items():
                before = sums.get(scope, dict.fromkeys(new, 0))
                sums[scope] = {what: before[what] + value for what, value in new.items()}
    sums = {scope: sums[scope] for scope in sorted(sums, key=_order)}
    examples = {name: sum(sizes[id(batch)] for batch in given) for name, given in data.items()}
    halves = min(map(len, data.values())) > 1
    table, per_language = _tables(data, sums, examples, halves)
    summary = _summary(table, per_language)
    network = "their subnetworks" if masked else "the full network"
    caption = (
        f"Cosine of the gradients of {len(names)} languages' mean losses in {network}, {span(examples.values())} "
        "examples each"
        + (
            "; all cosines are between gradients of halves of these, so that those of one language with itself "
            "(diagonal, the control) and with others are from equally many. Languages conflict as far as their cosine "
            "is below that of one with itself; 0 and above is no conflict of directions"
            if halves
            else ""
        )
        + f". Right: mean over {len(names) * (len(names) - 1) // 2} pairs (grey: least to largest) in each layer"
        + (", and mean over languages of the diagonal." if halves else ".")
    )
    shown = "cosine_halves" if halves else "cosine"
    largest = max(table[shown].abs().max(), per_language.split_half.abs().max(), 0.05)
    return Result(
        "conflict",
        table,
        caption,
        lambda extent=largest: _draw(names, table, per_language, summary, shown, extent),
        {"languages": per_language, "scopes": summary},
        float(largest),
    )


def _owned(whole: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
    """What each of the languages owns of the masked parameters, bool [L, *shape of the parameter as a matrix]."""
    found = {}
    for name, module in whole.named_modules():
        if isinstance(module, MaskedLinear):
            stem = f"{name}." if name else ""
            keep = module.mask.to_dense()[torch.tensor(rows, device=module.mask.device)]
            found[f"{stem}weight"] = keep.mT if module.transposed else keep
            if module.mask.kind == "rows" and module.bias is not None:
                found[f"{stem}bias"] = keep[:, :, :1]
    return found


def _scopes(model: nn.Module, whole: nn.Module, layers: Sequence[str] | None) -> dict[str, list[str]]:
    """To which scopes each parameter of `whole` belongs."""
    owner = owner_of(model)
    encoder: nn.Module = cast(Any, owner).base_model if hasattr(owner, "base_model") else owner
    modules = (
        layers_of(owner, structure_of(owner)) if layers is None else [owner.get_submodule(name) for name in layers]
    )
    inside = {id(parameter) for parameter in encoder.parameters()}
    number = {id(parameter): at for at, layer in enumerate(modules) for parameter in layer.parameters()}
    return {
        name: ["all"]
        + (["encoder"] if id(parameter) in inside else [])
        + ([f"layer {number[id(parameter)]}"] if id(parameter) in number else [])
        for name, parameter in whole.named_parameters()
    }


def _order(scope: str) -> tuple[int, int]:
    return (list(PANELS).index(scope), 0) if scope in PANELS else (len(PANELS), int(scope.split()[1]))


def _ratio(products: Any, squares: Any) -> Any:
    return np.divide(products, np.sqrt(squares), out=np.full_like(products, np.nan), where=squares > 0)


def _tables(
    data: Mapping[str, Sequence[Any]], sums: Mapping[str, Mapping[str, Any]], examples: Mapping[str, int], halves: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each scope and pair of languages, and one for each scope and language."""
    pairs, languages = [], []
    for scope, of in sums.items():
        cosines = _ratio(of["dot"], of["norms"] * of["norms"].T)
        between = _ratio(of["halves"], of["norms_a"] * of["norms_b"].T)
        between = (between + between.T) / 2 if halves else np.full_like(cosines, np.nan)
        for (i, a), (j, b) in itertools.combinations(enumerate(data), 2):
            both, absolute = of["both"][i, j], of["absolute"][i, j]
            plain = (both - of["signs"][i, j]) / 2 / both if both else np.nan
            weighted = (absolute - of["dot"][i, j]) / 2 / absolute if absolute else np.nan
            pairs.append((scope, a, b, cosines[i, j], between[i, j], plain, weighted, int(both)))
        for i, (name, given) in enumerate(data.items()):
            norm = np.sqrt(of["dot"][i, i]) / examples[name]  # of the mean loss, not the sum
            languages.append((scope, name, examples[name], len(given), norm, between[i, i]))
    columns = ["scope", "language_a", "language_b", "cosine", "cosine_halves", "conflict", "conflict_weighted"]
    return (
        pd.DataFrame(pairs, columns=[*columns, "coordinates"]),
        pd.DataFrame(languages, columns=["scope", "language", "examples", "batches", "norm", "split_half"]),
    )


def _summary(table: pd.DataFrame, per_language: pd.DataFrame) -> pd.DataFrame:
    found = table.groupby("scope", sort=False).agg(
        mean=("cosine", "mean"),
        least=("cosine", "min"),
        largest=("cosine", "max"),
        conflict=("conflict", "mean"),
        cosine_halves=("cosine_halves", "mean"),
        negative=("cosine", lambda cosine: float((cosine < 0).mean())),
    )
    found["split_half"] = per_language.groupby("scope")["split_half"].mean()
    return found.reset_index()


def _draw(
    names: Sequence[str],
    table: pd.DataFrame,
    per_language: pd.DataFrame,
    summary: pd.DataFrame,
    shown: str,
    extent: float,
) -> Any:
    scopes = [scope for scope in PANELS if (table.scope == scope).any()][-2:]
    n = len(names)
    side = max(2.8, (0.24 if n > 14 else 0.4) * n + 0.6)
    figure = new_figure(len(scopes) * (side + 0.3) + 4.2, side + 0.8)
    *panels, right = figure.subplots(1, len(scopes) + 1, width_ratios=[side] * len(scopes) + [2.8])
    for panel, scope in zip(panels, scopes, strict=True):
        half = table[table.scope == scope].pivot(index="language_a", columns="language_b", values=shown)
        half = half.reindex(index=names, columns=names).to_numpy()
        matrix = np.where(np.isnan(half), half.T, half)
        np.fill_diagonal(matrix, per_language[per_language.scope == scope].split_half)
        image = heatmap(panel, matrix, names, names, colours=SIGNED, low=-extent, high=extent)
        panel.set_title(PANELS[scope], fontsize=10)
    figure.colorbar(image, ax=panels[-1], label="cosine", shrink=0.8, pad=0.02)

    layers = [scope for scope in summary.scope if scope not in PANELS]
    at, pairs = np.arange(len(layers)), table.groupby("scope")[shown]
    right.fill_between(at, pairs.min()[layers], pairs.max()[layers], color=GREY, alpha=0.3, linewidth=0)
    right.plot(at, pairs.mean()[layers], "o-", color=COLOURS[0], label="two languages")
    if shown == "cosine_halves":
        own = summary.set_index("scope").split_half[layers]
        right.plot(at, own, "s--", color=COLOURS[1], label="one language with itself")
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_xticks(at[:: max(1, len(at) // 12)])
    right.set(xlabel="layer", ylabel="cosine", ylim=(-1.05 * extent, 1.05 * extent))
    bare(right)
    legend_above(right, ncols=1)
    return figure
