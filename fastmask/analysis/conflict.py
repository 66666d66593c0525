"""Gradient conflict: do the languages' gradients pull the shared parameters the same way?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, SIGNED, bare, heatmap, legend_above, new_figure
from fastmask.analysis.result import Result, span
from fastmask.linear import MaskedLinear
from fastmask.models.attach import attached, is_attached, language, owner_of
from fastmask.models.contexts import evaluating
from fastmask.models.structure import layers_of, structure_of

PANELS = {"all": "all parameters", "encoder": "encoder", "shared": "weights both own"}
HELD = 4 * 2**30  # bytes of gradients, of all languages together, that are held at a time
CHUNK = 1 << 16  # coordinates whose float64 products are summed at a time


def gradient_conflict(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    whole: nn.Module | None = None,
) -> Result:
    """Compare the gradients of the languages' mean losses, pair by pair.

    Each language's batches make two halves, with a_l and b_l the gradients of its even and its odd batches.

    - cosine: the mean of cos(a_i, b_j) and cos(a_j, b_i). The control is cos(a_l, b_l), one language with itself on
      other sentences: languages conflict as far as their cosine is lower (Yu et al. 2020 call a negative one a
      conflict).
    - conflict: of the coordinates where the gradients of all batches of both, a + b, are non-zero, the share in which
      their signs differ; one half for gradients that know nothing of each other.

    Over these `scope`s: "all" parameters of `whole`; the "encoder"; each "layer k" of it; and "shared", the weights in
    masked modules that both languages own: there gradients can meet at all (elsewhere in a masked module the product is
    0, but the norms are not).

    The gradients of all languages are held for some of the parameters at a time (`gradients_of`), so a large model is
    run several times.

    Args:
        model: a Hugging Face model, attached or not. In eval mode during the call.
        loss: runs the model on a batch -> one loss for each example, [B]. Without `language_ids`: it is called inside
            `fastmask.language`.
        batches: by language; a language's loss is the mean over the examples of all its batches.
        whole: the module whose parameters count, of which `model` is the encoder; default `model`.

    Returns:
        table: `scope`, `language_a`, `language_b`, `cosine`, `conflict`, `coordinates` (where both are non-zero). NaN
            where a gradient is zero.
        more["languages"]: `scope`, `language`, `examples`, `batches`, `split_half` (its cosine with itself).
        more["scopes"]: over pairs: `mean` cosine, `least`, `largest`, share `negative`, mean `conflict`; over
            languages: mean `split_half`.

    Raises:
        KeyError: a language without a subnetwork.
        ValueError: fewer than two languages, a language with fewer than two batches, a loss of another shape.
    """
    names = list(batches)
    data = {name: list(given) for name, given in batches.items()}
    if len(names) < 2:
        raise ValueError(f"gradients conflict between two languages or more, given {names}")
    for name, given in data.items():
        if len(given) < 2:
            raise ValueError(f"language {name!r} has {len(given)} batches (expected two or more, to make two halves)")
    whole = model if whole is None else whole
    masked = is_attached(model)
    owned = _owned(whole, [attached(model).subnets.index(name) for name in names]) if masked else {}
    sizes: dict[int, int] = {}

    def run(name: str, batch: Any) -> Tensor:
        with language(model, name) if masked else nullcontext(), torch.enable_grad():
            losses = loss(batch)
        if losses.ndim != 1:
            raise ValueError(f"expected one loss for each example, [batch], given shape {tuple(losses.shape)}")
        sizes[id(batch)] = len(losses)
        return losses.sum()

    scopes = _scopes(model, whole)
    sums: dict[str, Any] = {}
    with evaluating(whole):  # dropout would make halves and languages differ by chance
        for name, rows, gradients in gradients_of(whole, run, data):
            found = dict.fromkeys(scopes[name], products(gradients))
            if name in owned:
                found["shared"] = products(gradients, owned[name][:, rows])
            for scope, new in found.items():
                sums[scope] = sums.get(scope, 0) + new

    examples = {name: sum(sizes[id(batch)] for batch in given) for name, given in data.items()}
    pairs, languages = [], []
    order = [*PANELS, *(f"layer {number}" for number in range(len(scopes)))]
    for scope in sorted(sums, key=order.index):
        signs, both, dot, norms_a, norms_b = sums[scope]
        cosines = _over(dot, np.sqrt(norms_a * norms_b.T))
        cosines, conflict = (cosines + cosines.T) / 2, _over((both - signs) / 2, both)
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            pairs.append((scope, a, b, cosines[i, j], conflict[i, j], int(both[i, j])))
        for i, (name, given) in enumerate(data.items()):
            languages.append((scope, name, examples[name], len(given), cosines[i, i]))
    columns = ["scope", "language_a", "language_b", "cosine", "conflict", "coordinates"]
    table = pd.DataFrame(pairs, columns=columns)
    per_language = pd.DataFrame(languages, columns=["scope", "language", "examples", "batches", "split_half"])
    summary = table.groupby("scope", sort=False).agg(
        mean=("cosine", "mean"),
        least=("cosine", "min"),
        largest=("cosine", "max"),
        negative=("cosine", lambda cosine: float((cosine < 0).mean())),
        conflict=("conflict", "mean"),
    )
    summary["split_half"] = per_language.groupby("scope")["split_half"].mean()
    summary = summary.reset_index()
    network = "their subnetworks" if masked else "the full network"
    caption = (
        f"Cosine of the gradients of {len(names)} languages' mean losses in {network}, {span(examples.values())} "
        "examples each; all cosines are between gradients of halves of these, so that those of one language with "
        "itself (diagonal, the control) and with others are from equally many. Languages conflict as far as their "
        "cosine is below that of one with itself; 0 and above is no conflict of directions. Right: mean over "
        f"{len(names) * (len(names) - 1) // 2} pairs (grey: least to largest) in each layer, and mean over languages "
        "of the diagonal."
    )
    largest = float(max(table.cosine.abs().max(), per_language.split_half.abs().max(), 0.05))
    more = {"languages": per_language, "scopes": summary}
    return Result("conflict", table, caption, partial(_draw, table, per_language, summary), more, largest)


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


def _scopes(model: nn.Module, whole: nn.Module) -> dict[str, list[str]]:
    """To which scopes each parameter of `whole` belongs."""
    owner: Any = owner_of(model)
    layers = layers_of(owner, structure_of(owner))
    parts = {"encoder": getattr(owner, "base_model", owner), **{f"layer {k}": layer for k, layer in enumerate(layers)}}
    inside = {scope: {id(parameter) for parameter in part.parameters()} for scope, part in parts.items()}
    return {
        name: ["all", *(scope for scope, members in inside.items() if id(parameter) in members)]
        for name, parameter in whole.named_parameters()
    }


def _over(values: Any, by: Any) -> Any:
    return np.divide(values, by, out=np.full_like(values, np.nan), where=by > 0)


def gradients_of(
    whole: nn.Module, run: Callable[[str, Any], Tensor], data: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Gradients of every language's summed loss with respect to every parameter, one parameter at a time.

    As many parameters as fit into `HELD` are differentiated together; for the next ones every batch runs again.
    `run`(language, batch) runs `whole`, in eval mode (its passes must not see different dropout), and returns a scalar.

    Yields:
        (name, rows, gradients): gradients [L, 2, R, C] of the sums over even and over odd batches, in the rows [R]
        where some language has a gradient; of an embedding those are the words that occur. A vector has C = 1.
    """
    left = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
    while left:
        sizes = np.cumsum([2 * len(data) * parameter.nbytes for _, parameter in left])
        fitting = max(1, int((sizes <= HELD).sum()))
        group, left = left[:fitting], left[fitting:]
        found: dict[str, list[tuple[int, int, Tensor, Tensor]]] = {name: [] for name, _ in group}
        for (place, (language_name, batches)), half in itertools.product(enumerate(data.items()), (0, 1)):
            sums: Sequence[Tensor] = ()
            for batch in batches[half::2]:
                parameters = [parameter for _, parameter in group]
                of_batch = torch.autograd.grad(run(language_name, batch), parameters, materialize_grads=True)
                sums = [a + b for a, b in zip(sums, of_batch, strict=True)] if sums else of_batch
            for (name, _), gradient in zip(group, sums, strict=False):
                matrix = gradient.reshape(len(gradient), -1) if gradient.ndim else gradient.reshape(1, 1)
                rows = matrix.any(1).nonzero()[:, 0]
                found[name].append((place, half, rows, matrix[rows]))
        for name, _ in group:
            pieces = found.pop(name)
            rows = torch.cat([own for _, _, own, _ in pieces]).unique()
            if len(rows):
                gradients = pieces[0][3].new_zeros(len(data), 2, len(rows), pieces[0][3].shape[1])
                for place, half, own, values in pieces:
                    gradients[place, half, torch.searchsorted(rows, own)] = values
                yield name, rows, gradients


def products(gradients: Tensor, owned: Tensor | None = None) -> NDArray[np.float64]:
    """Sums over coordinates of products of L gradients [L, 2, R, C], as [5, L, L] of languages i and j.

    With g = a + b the gradient of all batches, a of the even and b of the odd ones: the sign of g_i g_j; 1 where it is
    not 0; a_i b_j; and the squares of a_i and b_i over what j owns (`owned` bool [L, R, C]; default everything).
    """
    L = len(gradients)
    everything = torch.ones(1, 1, dtype=torch.bool, device=gradients.device)
    keeps = everything.expand(L, gradients[0, 0].numel()) if owned is None else owned.flatten(1)
    sums = np.zeros((5, L, L))
    for piece, kept in zip(gradients.flatten(2).split(CHUNK, 2), keeps.split(CHUNK, 1), strict=True):
        a, b = piece.double().unbind(1)
        signs, keep = (a + b).sign(), kept.double()
        pairs = [(signs, signs), (signs.abs(), signs.abs()), (a, b), (a.square(), keep), (b.square(), keep)]
        sums += torch.stack([x @ y.t() for x, y in pairs]).cpu().numpy()
    return sums


def _draw(table: pd.DataFrame, per_language: pd.DataFrame, summary: pd.DataFrame, extent: float) -> Any:
    names = list(dict.fromkeys(per_language.language))
    scopes = [scope for scope in PANELS if (table.scope == scope).any()][-2:]
    n = len(names)
    side = max(2.8, (0.24 if n > 14 else 0.4) * n + 0.6)
    figure = new_figure(len(scopes) * (side + 0.3) + 4.2, side + 0.8)
    *panels, right = figure.subplots(1, len(scopes) + 1, width_ratios=[side] * len(scopes) + [2.8])
    for panel, scope in zip(panels, scopes, strict=True):
        half = table[table.scope == scope].pivot(index="language_a", columns="language_b", values="cosine")
        half = half.reindex(index=names, columns=names).to_numpy()
        matrix = np.where(np.isnan(half), half.T, half)
        np.fill_diagonal(matrix, per_language[per_language.scope == scope].split_half)
        image = heatmap(panel, matrix, names, names, colours=SIGNED, low=-extent, high=extent)
        panel.set_title(PANELS[scope], fontsize=10)
    figure.colorbar(image, ax=panels[-1], label="cosine", shrink=0.8, pad=0.02)

    layers = [scope for scope in summary.scope if scope not in PANELS]
    at, pairs = np.arange(len(layers)), table.groupby("scope")["cosine"]
    right.fill_between(at, pairs.min()[layers], pairs.max()[layers], color=GREY, alpha=0.3, linewidth=0)
    right.plot(at, pairs.mean()[layers], "o-", color=COLOURS[0], label="two languages")
    own = summary.set_index("scope").split_half[layers]
    right.plot(at, own, "s--", color=COLOURS[1], label="one language with itself")
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_xticks(at[:: max(1, len(at) // 12)])
    right.set(xlabel="layer", ylabel="cosine", ylim=(-1.05 * extent, 1.05 * extent))
    bare(right)
    legend_above(right, ncols=1)
    return figure


# ---- several networks


def side_by_side(table: pd.DataFrame, name: str = "conflict") -> Result:
    """Several networks: `table` is `more["scopes"]` of each, with columns `variant` and `seed`.

    They may be one network at several checkpoints.
    """
    table = table[["variant", "seed", *table.columns.drop(["variant", "seed"])]]
    caption = (
        f"Cosine of gradients in {table.variant.nunique()} networks, {table.seed.nunique()} "
        f"seed{'s' if table.seed.nunique() > 1 else ''} (small: each seed, large: their mean): over pairs of two "
        "languages, beside the control, one language with itself on other examples; both from halves of equally many. "
        "Languages conflict as far as the first is lower. Weights both own: those in masked modules that belong to "
        "both."
    )
    return Result(name, table, caption, partial(_draw_side_by_side, table))


def _draw_side_by_side(table: pd.DataFrame) -> Any:
    scopes = [scope for scope in PANELS if (table.scope == scope).any()]
    variants = list(dict.fromkeys(table.variant))
    figure = new_figure(1.6 + 2.9 * len(scopes), 0.36 * len(variants) + 1.7)
    panels = figure.subplots(1, len(scopes), sharey=True, sharex=True, squeeze=False)[0]
    lines = {"mean": (-0.13, "two languages"), "split_half": (0.13, "one language with itself")}
    for panel, scope in zip(panels, scopes, strict=True):
        rows = table[table.scope == scope]
        for at, (column, (shift, label)) in enumerate(lines.items()):
            style = {"color": COLOURS[at], "marker": MARKERS[at], "linestyle": ""}
            y = [variants.index(variant) + shift for variant in rows.variant]
            panel.plot(rows[column], y, markersize=3, alpha=0.6, **style)
            means = rows.groupby("variant")[column].mean().reindex(variants)
            panel.plot(means, np.arange(len(variants)) + shift, markersize=7, label=label, fillstyle="none", **style)
        panel.axvline(0, color=GREY, linewidth=0.8)
        panel.set_title(PANELS[scope], fontsize=10)
        panel.set_xlabel("cosine of gradients")
        panel.grid(axis="x", color=GREY, alpha=0.2)
        panel.set_axisbelow(True)
    bare(*panels)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    shown = panels[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
