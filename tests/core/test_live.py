"""What of a weight several languages own, from masks of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.linear import MaskedLinear
from fastmask.live import WHOLE, live_of, masked_parameters
from tests.core.oracle import KINDS, random_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from([1, 2, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    density=st.floats(0, 1),
    languages=st.sets(st.integers(-1, 3)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_live_parts_are_those_of_the_dense_masks(kind, unit, rows, columns, density, languages, dtype, seed):
    """A live part holds the weights that some language owns, its complement the others, and no other is touched."""
    N, K = rows * unit, columns * unit
    mask = random_mask(kind, 4, N, K, density, unit, seed)
    dense = torch.ones(N, K, dtype=torch.bool) if -1 in languages else mask.to_dense()[list(languages)].any(0)
    live = live_of(mask, languages)
    assert (live is WHOLE) == bool(dense.all())
    assert live.share == pytest.approx(dense.double().mean().item())
    generator = torch.Generator().manual_seed(seed)
    for flags in (dense, dense[:, 0]) if kind == "rows" else (dense,):
        parameter = torch.randn(flags.shape, generator=generator).to(dtype)
        if live is not WHOLE:
            assert torch.equal(live.keep(parameter).expand_as(flags), flags)
        assert torch.equal(live.only(parameter.where(flags, torch.nan)), parameter.where(flags, 0))
        for part, own in ((live, flags),) if live is WHOLE else ((live, flags), (live.dead, ~flags)):
            values = part.read(parameter)
            assert torch.equal(values.flatten().sort().values, parameter[own].sort().values)
            target = torch.full_like(parameter, torch.nan)
            part.write(target, values)
            assert torch.equal(target[own], parameter[own])
            assert target[~own].isnan().all()


def test_parameters_in_another_memory_order():
    """A weight that lies transposed in memory is read and written at the same places."""
    for kind in KINDS:
        live = live_of(random_mask(kind, 4, 8, 12, unit=2), [0])
        weight = torch.randn(12, 8).t()
        target = torch.zeros(12, 8).t()
        live.write(target, live.read(weight))
        assert torch.equal(target, weight * live.keep(weight))
        assert torch.equal(live.only(weight), weight * live.keep(weight))


@pytest.mark.parametrize("flags", ["1", "0", "0110", "1001", "101", "010"])
def test_runs_of_rows(flags):
    """Runs cut a tensor where rows begin or cease to live: every other part, from the second on, is alive."""
    keep = torch.tensor([flag == "1" for flag in flags])
    mask = random_mask("rows", 1, len(flags), 3).replaced(0, keep)
    if keep.all():
        return
    parts = torch.arange(len(flags)).split(live_of(mask, [0]).runs)
    assert torch.cat(parts[1::2] or [torch.zeros(0)]).tolist() == keep.nonzero().flatten().tolist()
    assert torch.cat(parts).tolist() == list(range(len(flags)))


def test_one_dead_weight_of_many():
    """A share that rounds to all is not taken for all."""
    keep = torch.ones(1, 1, 2**25 + 1, dtype=torch.bool)
    keep[..., 5] = False
    live = live_of(random_mask("weights", 1, 1, 1).weights(keep), [0])
    assert live is not WHOLE
    assert live.dead.read(torch.arange(2**25 + 1)[None]).tolist() == [5]


def test_it_is_made_once_for_each_mask_and_set_of_languages():
    """Whoever asks again gets what was made before, but not what was made for another mask."""
    mask = random_mask("rows", 4, 8, 8)
    live = live_of(mask, [0, 3])
    assert live is live_of(mask, [3, 0, 3])
    assert live is not live_of(mask, [0])
    changed = mask.replaced(0, ~mask.to_dense()[0, :, 0])
    assert not torch.equal(live_of(changed, [0]).cells(), live_of(mask, [0]).cells())


def test_ids_out_of_range():
    """A wrong id is refused: it would read another language's mask, or memory behind all masks."""
    mask = random_mask("weights", 4, 8, 8)
    for language in (4, -2):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            live_of(mask, [language])


def test_tied_weights_and_biases_that_no_mask_gates_are_not_listed():
    """A parameter that is also used in full, as an output layer or a bias below a column mask, may change anywhere."""
    for kind in KINDS:
        net = torch.nn.Module()
        net.masked = MaskedLinear(8, 8, random_mask(kind, 4, 8, 8))
        assert list(masked_parameters(net)) == [net.masked.weight, net.masked.bias][: 1 + (kind == "rows")]
        net.tied = torch.nn.Linear(8, 8)
        net.tied.weight = net.masked.weight
        assert net.masked.weight not in masked_parameters(net)
