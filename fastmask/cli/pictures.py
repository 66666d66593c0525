"""Pictures of a run's subnetworks."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmask.files import replace_file
from fastmask.subnetworks import Subnetworks

__all__ = ["head_use"]


def head_use(subnets: Subnetworks, path: str | PathLike[str], *, follow: bool = True) -> None:
    """Draw which heads each language keeps, and what share of each layer's neurons; the ending gives the format.

    Args:
        subnets: with masks over heads, neurons or both.
        path: where to.
        follow: see `fastmask.files.replace_file`.

    Raises:
        ValueError: the subnetworks have masks neither over heads nor over neurons.
    """
    from fastmask.analysis.drawing import new_figure

    panels = [kind for kind, keep in (("heads", subnets.heads), ("neurons", subnets.neurons)) if keep is not None]
    if not panels:
        raise ValueError("there is nothing to draw: these subnetworks mask neither heads nor neurons")
    languages = len(subnets.languages)
    widths = [max(4.0, 0.14 * subnets.heads[0].numel()) if kind == "heads" else 4.0 for kind in panels]  # type: ignore[index]
    figure = new_figure(sum(widths) + 1.5, max(2.4, 0.3 * languages + 1.4))
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, kind in zip(axes, panels, strict=True):
        if kind == "heads" and subnets.heads is not None:
            _draw_heads(axis, subnets.heads)
        elif subnets.neurons is not None:
            _draw_neurons(figure, axis, subnets.neurons)
        axis.set_yticks(axis.get_yticks(), subnets.languages)
        axis.set_xlabel("layer")
    form = Path(path).suffix.lstrip(".") or "png"
    replace_file(path, lambda partial: figure.savefig(partial, dpi=150, format=form), follow=follow)


def _draw_heads(axis: Any, keep: Tensor) -> None:
    """One cell for each head, dark where the language keeps it; a gap between layers."""
    languages, layers, heads = keep.shape
    cells = torch.full((languages, layers, heads + 1), float("nan"))
    cells[:, :, :heads] = keep.float()
    axis.pcolormesh(cells.flatten(1)[:, :-1], cmap="Blues", vmin=-0.2, vmax=1.25, edgecolors="white", linewidth=0.8)
    axis.set_ylim(languages, 0)
    axis.set_xticks([layer * (heads + 1) + heads / 2 for layer in range(layers)], range(layers))
    axis.set_yticks([row + 0.5 for row in range(languages)])
    axis.set_title(f"heads kept (dark), {heads} a layer")


def _draw_neurons(figure: Any, axis: Any, keep: Tensor) -> None:
    """One cell for each layer, with the percentage of its neurons that the language keeps."""
    shares = keep.float().mean(2) * 100
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row in range(shares.shape[0]):
        for column in range(shares.shape[1]):
            value = float(shares[row, column])
            colour = "white" if value > 60 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(shares.shape[1]))
    axis.set_yticks(range(shares.shape[0]))
    axis.set_title(f"neurons kept, % of {keep.shape[2]} a layer")
    figure.colorbar(image, ax=axis, shrink=0.8)
