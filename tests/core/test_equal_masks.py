"""Languages whose masks are equal run as one: the same numbers, in fewer products."""

from __future__ import annotations

import pytest
import torch
from oracle import KINDS, check, random_mask

from fastmask.masks import FULL, Mask
from fastmask.torch_path.layers import _made
from fastmask.torch_path.split import Split


def with_equal(mask: Mask, source: list[int]) -> Mask:
    """A mask whose language l owns what language source[l] of `mask` owns."""
    keep = mask.to_dense()[source]
    if mask.kind == "rows":
        return Mask.rows(keep[:, :, 0], mask.in_features)
    if mask.kind == "columns":
        return Mask.columns(keep[:, 0], mask.out_features)
    if mask.kind == "blocks":
        bn, bk = mask.geometry
        return Mask.blocks(keep[:, ::bn, ::bk], (bn, bk))
    return Mask.weights(keep)


def pieces(mask: Mask):
    return _made(mask, packed=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [3, 1, 0, 0, 2, 1], [-1, 0, 3, 3]], ids=str)
def test_the_result_is_that_of_each_language(kind, ids, every_way):
    """Each language gets its own weights, and each weight its whole gradient."""
    mask = with_equal(random_mask(kind, 4, 8, 8, unit=2, extremes=False), [0, 1, 0, 1])
    torch.manual_seed(0)
    check(torch.randn(len(ids), 5, 8), torch.randn(8, 8), torch.randn(8), mask, torch.tensor(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_masks_make_one_part(kind):
    """Languages with equal masks are multiplied together."""
    layer = pieces(with_equal(random_mask(kind, 4, 8, 8, unit=2, extremes=False), [0, 1, 0, 1]))
    split = Split([0, 2, 0, 2, 1, 3])
    merged = split.merged([layer.same_as])
    assert merged.parts == [(0, 0, 4), (1, 4, 6)]
    assert split.merged([layer.same_as]) is merged


def test_layers_must_all_agree():
    """Languages are one part only if the masks of Q, K and V are all equal."""
    mask = random_mask("rows", 3, 8, 8, unit=2, extremes=False)
    same, other = pieces(with_equal(mask, [0, 0, 0])), pieces(with_equal(mask, [0, 0, 1]))
    split = Split([0, 1, 2])
    assert len(split.merged([same.same_as]).parts) == 1
    assert len(split.merged([same.same_as, other.same_as]).parts) == 2


def test_a_language_that_owns_everything_is_the_full_network():
    """A language that owns everything is multiplied together with the full network."""
    layer = pieces(Mask.rows(torch.ones(3, 8, dtype=torch.bool), 4))
    assert Split([0, 1, -1, 2]).merged([layer.same_as]).parts == [(FULL, 0, 4)]


def test_different_masks_stay_as_they_are():
    """Languages with different masks are left as they are."""
    layer, split = pieces(Mask.rows(torch.eye(3, dtype=torch.bool), 4)), Split([0, 1, 2])
    assert split.merged([layer.same_as]) is split


@pytest.mark.parametrize(
    ("counts", "tokens", "together"),
    [
        ([900, 901, 890, 900], [5, 5, 5, 5], [4]),
        ([900, 901, 890, 900], [5, 5, 4, 4], [2, 2]),
        ([900, 901, 890, 900], [5, 4, 3, 2], [1, 1, 1, 1]),
        ([900, 901, 1500, 900], [5, 5, 5, 5], [1, 1, 1, 1]),
        ([900, 901, 2000, 900], [5, 5, 5, 5], [2, 1, 1]),
    ],
    ids=["alike", "two lengths", "all lengths", "one with more units", "one with all units"],
)
def test_languages_that_are_alike_are_multiplied_together(counts, tokens, together):
    """Equally many tokens and about as many live units make one product; rows that fill up are marked."""
    layer = pieces(Mask.rows(torch.arange(2000) < torch.tensor(counts)[:, None], 700))
    groups = layer._groups(tuple(range(4)), [torch.empty(n, 700, dtype=torch.float64) for n in tokens])
    assert [group.stop - group.start for group, _ in groups] == together
    for group, live in groups:
        if live is not None:
            assert live.own == (counts[group] if len(counts[group]) > 1 else None)
