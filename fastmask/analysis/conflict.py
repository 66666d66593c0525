"""Gradient conflict: do the languages' gradients pull the shared parameters the same way?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fastmask.analysis.drawing import COLOURS, GREY, SIGNED, heatmap, new_figure
from fastmask.analysis.lockstep import gradients_in_lockstep
from fastmask.analysis.products import Products, cosines_of, masks_of
from fastmask.analysis.result import Result
from fastmask.models.attach import attached, is_attached, language, owner_of
from fastmask.models.structure import layers_of, structure_of

__all__ = ["gradient_conflict"]


def gradient_conflict(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    whole: nn.Module | None = None,
    full: bool = False,
    cuts: Sequence[str] | None = None,
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

    L gradients are never held at once: passes run in lockstep, layer by layer (`lockstep`). Peak memory is that of the
    activations of all batches, plus 2 L gradients (L without halves) of the largest layer.

    Args:
        model: a Hugging Face model, attached or not, or any module with `cuts`. In eval mode during the call.
        loss: runs the model on a batch -> one loss for each example, [B]. Without `language_ids`: it is called inside
            `fastmask.language`.
        batches: by language; a language's loss is the mean over the examples of all its batches.
        whole: the module whose parameters count, of which `model` is the encoder; default `model`.
        full: run the full network of an attached model, not the subnetworks.
        cuts: names of modules of `model` whose outputs end a part of the lockstep; default the layers of the model's
            family. Parts should be as large as a layer: one part, `cuts=()`, holds L gradients of the whole model.

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
    ids = torch.tensor([attached(model).subnets.index(name) for name in names]) if masked else None
    halves = min(len(given) for given in data.values()) > 1
    passes, examples = _passes(model, loss, data, is_attached(model), full, halves)

    scopes = _Scopes(model, whole, cuts)
    masks = masks_of(whole) if masked else {}
    sums: dict[str, Products] = {}
    with _evaluating(whole):
        for name, grads in gradients_in_lockstep(whole, scopes.cuts, passes):
            parts = grads.unflatten(0, (len(names), -1))
            found = Products.of(parts.flatten(2))
            for scope in scopes.of(name):
                sums.setdefault(scope, Products(len(names))).add(found)
            if ids is not None and name in masks:
                shared = sums.setdefault("shared", Products(len(names)))
                shared.add(found)
                shared.add_owned(parts, masks[name], ids)
    table = _table(names, sums)
    per_language = _languages(names, sums, examples, data)
    summary = _summary(table, per_language)
    network = "their subnetworks" if masked else "the full network"
    counts = sorted(examples.values())
    caption = (
        f"Cosine of the gradients of {len(names)} languages' mean losses in {network}, {counts[0]}"
        + (f"-{counts[-1]}" if counts[-1] > counts[0] else "")
        + " examples each"
        + (
            "; all cosines are between gradients of halves of these, so that those of one language with itself "
            "(diagonal) and with others are from equally many"
            if halves
            else ""
        )
        + f". Right: mean over {len(names) * (len(names) - 1) // 2} pairs (grey: least to largest) in each layer"
        + (", and mean over languages of the diagonal." if halves else ".")
    )
    more = {"languages": per_language, "scopes": summary}
    return Result("conflict", table, caption, lambda: _draw(names, table, per_language, summary), more)


def _passes(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    data: Mapping[str, Sequence[Any]],
    has_masks: bool,
    full: bool,
    halves: bool,
) -> tuple[list[tuple[int, Callable[[], Tensor]]], dict[str, int]]:
    """One pass for each batch, and how many examples each language turns out to have once they ran."""
    examples = dict.fromkeys(data, 0)

    def run(name: str, batch: Any) -> Tensor:
        with language(model, None if full else name) if has_masks else nullcontext():
            losses = loss(batch)
        if losses.ndim != 1:
            raise ValueError(f"expected one loss for each example, [batch], given shape {tuple(losses.shape)}")
        examples[name] += len(losses)
        return losses.sum()

    passes: list[tuple[int, Callable[[], Tensor]]] = []
    for row, (name, given) in enumerate(data.items()):
        for at, batch in enumerate(given):
            vector = 2 * row + at % 2 if halves else row
            passes.append((vector, lambda name=name, batch=batch: run(name, batch)))  # type: ignore[misc]
    return passes, examples


class _Scopes:
    """To which scopes a parameter of `whole` belongs, and where passes are cut."""

    def __init__(self, model: nn.Module, whole: nn.Module, cuts: Sequence[str] | None) -> None:
        owner = owner_of(model)
        encoder: nn.Module = cast(Any, owner).base_model if hasattr(owner, "base_model") else owner
        layers = [owner.get_submodule(name) for name in cuts or ()]
        if cuts is None:
            layers = layers_of(owner, structure_of(owner))
        self.cuts = layers
        inside = {id(parameter) for parameter in encoder.parameters()}
        number = {id(parameter): at for at, layer in enumerate(layers) for parameter in layer.parameters()}
        self._scopes = {
            name: ["all"]
            + (["encoder"] if id(parameter) in inside else [])
            + ([f"layer {number[id(parameter)]}"] if id(parameter) in number else [])
            for name, parameter in whole.named_parameters()
        }

    def of(self, name: str) -> list[str]:
        """The scopes of a parameter."""
        return self._scopes[name]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode: dropout would make halves and languages differ by chance."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


# ---- tables


def _order(scope: str) -> tuple[int, int]:
    fixed = {"all": 0, "encoder": 1, "shared": 2}
    return (fixed[scope], 0) if scope in fixed else (3, int(scope.split()[1]))


def _table(names: Sequence[str], sums: Mapping[str, Products]) -> pd.DataFrame:
    rows = []
    for scope in sorted(sums, key=_order):
        found = sums[scope]
        cosines, halves = cosines_of(found, scope)
        for i, j in itertools.combinations(range(len(names)), 2):
            both, absolute = found.both[i, j], found.absolute[i, j]
            plain = (both - found.signs[i, j]) / 2 / both if both else np.nan
            weighted = (absolute - found.dot[i, j]) / 2 / absolute if absolute else np.nan
            rows.append((scope, names[i], names[j], cosines[i, j], halves[i, j], plain, weighted, int(both)))
    columns = ["scope", "language_a", "language_b", "cosine", "cosine_halves", "conflict", "conflict_weighted"]
    return pd.DataFrame(rows, columns=[*columns, "coordinates"])


def _languages(
    names: Sequence[str], sums: Mapping[str, Products], examples: Mapping[str, int], data: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    rows = []
    for scope in sorted(sums, key=_order):
        half = np.diag(cosines_of(sums[scope], scope)[1])
        for row, name in enumerate(names):
            norm = np.sqrt(sums[scope].dot[row, row]) / examples[name]  # of the mean loss, not the sum
            rows.append((scope, name, examples[name], len(data[name]), norm, half[row]))
    return pd.DataFrame(rows, columns=["scope", "language", "examples", "batches", "norm", "split_half"])


def _summary(table: pd.DataFrame, per_language: pd.DataFrame) -> pd.DataFrame:
    grouped = table.groupby("scope", sort=False)
    found = grouped.agg(
        mean=("cosine", "mean"), least=("cosine", "min"), largest=("cosine", "max"), conflict=("conflict", "mean")
    )
    found["cosine_halves"] = grouped["cosine_halves"].mean()
    found["negative"] = grouped["cosine"].apply(lambda cosine: float((cosine < 0).mean()))
    found["split_half"] = per_language.groupby("scope")["split_half"].mean()
    return found.reset_index()


# ---- the picture


def _draw(names: Sequence[str], table: pd.DataFrame, per_language: pd.DataFrame, summary: pd.DataFrame) -> Any:
    scopes = [scope for scope in ("all", "encoder", "shared") if (table.scope == scope).any()][-2:]
    n, shown = len(names), "cosine_halves" if table.cosine_halves.notna().any() else "cosine"
    side = max(2.8, (0.24 if n > 14 else 0.4) * n + 0.6)
    figure = new_figure(len(scopes) * (side + 0.3) + 4.2, side + 0.8)
    panels = figure.subplots(1, len(scopes) + 1, width_ratios=[side] * len(scopes) + [2.8])
    matrices = []
    for scope in scopes:
        matrix = np.full((n, n), np.nan)
        for row in table[table.scope == scope].itertuples():
            a, b = names.index(row.language_a), names.index(row.language_b)
            matrix[a, b] = matrix[b, a] = getattr(row, shown)
        np.fill_diagonal(matrix, per_language[per_language.scope == scope].split_half)
        matrices.append(matrix)
    most = max([0.05, *(float(np.nanmax(np.abs(m))) for m in matrices if np.isfinite(m).any())])
    image = None
    for panel, scope, matrix in zip(panels, scopes, matrices, strict=False):
        image = heatmap(panel, matrix, names, names, colours=SIGNED, low=-most, high=most)
        panel.set_title({"shared": "weights both own", "all": "all parameters"}.get(scope, scope), fontsize=10)
    figure.colorbar(image, ax=panels[len(scopes) - 1], label="cosine", shrink=0.8, pad=0.02)

    right, layers = panels[-1], [scope for scope in summary.scope if scope.startswith("layer")]
    at, pairs = np.arange(len(layers)), table.groupby("scope")[shown]
    right.fill_between(at, pairs.min()[layers], pairs.max()[layers], color="#DDDDDD", linewidth=0)
    right.plot(at, pairs.mean()[layers], "o-", color=COLOURS[0], label="two languages")
    if shown == "cosine_halves":
        own = summary.set_index("scope").split_half[layers]
        right.plot(at, own, "s--", color=COLOURS[1], label="one language with itself")
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_xticks(at[:: max(1, len(at) // 12)])
    right.set_xlabel("layer")
    right.set_ylabel("cosine")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=False)
    return figure
