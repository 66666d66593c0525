"""Which weights are live for several languages, from masks of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.linear import MaskedLinear
from fastmask.optim.live import live_part, masked_parameters
from tests.core.oracle import KINDS, random_mask


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from([1, 2, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    density=st.floats(0, 1),
    languages=st.sets(st.integers(-1, 3), min_size=1),
    seed=st.integers(0, 99),
)
def test_live_parts_are_those_of_the_dense_masks(kind, unit, rows, columns, density, languages, seed):
    """A step would move a weight that no language of the batch owns, or leave one that some language owns."""
    N, K = rows * unit, columns * unit
    mask = random_mask(kind, 4, N, K, density, unit, seed)
    dense = torch.ones(N, K, dtype=torch.bool) if -1 in languages else mask.to_dense()[list(languages)].any(0)
    for of_bias in (False, True) if kind == "rows" else (False,):
        expected = dense[:, 0] if of_bias else dense
        live = live_part(mask, frozenset(languages), of_bias)
        if live is None:
            assert expected.all()
        else:
            assert not expected.all()
            assert torch.equal(live.keep().expand_as(expected), expected)


def test_it_is_made_once_for_each_mask_and_set_of_languages():
    """Every step would build what it needs anew; or another mask would get what was made for this one."""
    mask = random_mask("rows", 4, 8, 8)
    live = live_part(mask, frozenset([0, 3]), False)
    assert live is live_part(mask, frozenset([3, 0]), False)
    assert live is not live_part(mask, frozenset([0]), False)
    changed = mask.replaced(0, ~mask.to_dense()[0, :, 0])
    assert not torch.equal(
        live_part(changed, frozenset([0]), False).keep(), live_part(mask, frozenset([0]), False).keep()
    )


def test_ids_out_of_range():
    """A wrong id would read another language's mask, or memory behind all masks."""
    mask = random_mask("weights", 4, 8, 8)
    for language in (4, -2):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            live_part(mask, frozenset([language]), False)


def test_tied_weights_and_biases_that_no_mask_gates_are_not_listed():
    """A parameter that is also used in full, as an output layer or a bias below a column mask, would be held back."""
    for kind in KINDS:
        net = torch.nn.Module()
        net.masked = MaskedLinear(8, 8, random_mask(kind, 4, 8, 8))
        assert (
            list(masked_parameters(net, [net.masked])) == [net.masked.weight, net.masked.bias][: 1 + (kind == "rows")]
        )
        net.tied = torch.nn.Linear(8, 8)
        net.tied.weight = net.masked.weight
        assert net.masked.weight not in masked_parameters(net, [net.masked])
