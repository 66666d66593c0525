"""Random batches, masks and weights for the tests of the row kernels."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fastmask_kernels.configs import Config
from fastmask_kernels.naive import naive_row_weight_grad
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_weight_grad import row_weight_grad
from kernel_oracle import DEVICE, assert_close
from torch import Tensor


@pytest.fixture(autouse=True)
def nan_from_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel does not write, shows."""
    empty = torch.empty

    def nan_empty(*shape, **options):  # type: ignore[no-untyped-def]
        out = empty(*shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", nan_empty)


def row_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """`index` int64 [L, most] and `counts` int64 [L] of keep bool [L, N], as `fastmask.Mask.rows` stores them."""
    counts = keep.sum(1)
    most = max(1, int(counts.max()))
    index = torch.zeros(keep.shape[0], most, dtype=torch.int64)
    for language, own in enumerate(keep):
        live = own.nonzero().flatten()
        index[language, : len(live)] = live
    return index.to(DEVICE), counts.to(DEVICE)


@dataclass
class Sample:
    """A mixed batch, and one to three weights with a mask over their rows each."""

    plan: Plan
    languages: list[int]  # of each of the M rows
    x: Tensor  # [M, K]
    weights: list[Tensor]  # [N_g, K]
    biases: list[Tensor]  # [N_g]
    indices: list[Tensor]
    counts: list[Tensor]
    widths: list[int]
    packed: list[Tensor]  # random packed activations [M, width_g], NaN behind each row's live units
    bias: Tensor  # [K]

    @property
    def masks(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.indices, self.counts


def sample(
    ids: list[int], tokens: int, L: int, Ns: list[int], K: int, dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None, seed: int = 0, spare: int = 3, whole: bool = False, unit: int = 1,
) -> Sample:  # fmt: skip
    """Random masks of about half the rows; from three languages on the second owns nothing and the third everything.

    Args:
        ids: the language of each example.
        tokens: T of each example.
        L: number of languages.
        Ns: rows of each weight.
        K: columns of all weights.
        dtype: of activations.
        weight_dtype: of weights, the same if None.
        seed: of everything random.
        spare: packed columns more than any language of the batch needs.
        unit: rows that live and die together.
        whole: whole numbers from -2 to 2 everywhere, of which every sum here is exact.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    weight_dtype = weight_dtype or dtype
    languages = [language for language in ids for _ in range(tokens)]
    indices, counts, widths, packed = [], [], [], []
    for N in Ns:
        keep = (torch.rand(L, N // unit, generator=generator) < 0.5).repeat_interleave(unit, 1)
        if L >= 3:
            keep[1], keep[2] = False, True
        index, count = row_mask(keep)
        live = [N if language < 0 else int(count[language]) for language in languages]
        width = max([1, *live]) + spare
        part = randn(len(languages), width)
        for row, own in enumerate(live):
            part[row, own:] = torch.nan
        indices.append(index)
        counts.append(count)
        widths.append(width)
        packed.append(part.to(DEVICE, dtype))
    return Sample(
        plan=Plan(torch.tensor(ids, dtype=torch.int64, device=DEVICE), tokens, L),
        languages=languages,
        x=randn(len(languages), K).to(DEVICE, dtype),
        weights=[randn(N, K).to(DEVICE, weight_dtype) for N in Ns],
        biases=[randn(N).to(DEVICE, weight_dtype) for N in Ns],
        indices=indices,
        counts=counts,
        widths=widths,
        packed=packed,
        bias=randn(K).to(DEVICE, weight_dtype),
    )


def check_row_weight_grad(
    s: Sample, config: Config | None, weight_dtype: torch.dtype, bias: bool = True, unit: int = 1
) -> None:
    """`row_weight_grad` against the oracle."""
    n_rows = [weight.shape[0] for weight in s.weights]
    dW, db = row_weight_grad(
        s.packed,
        s.x,
        *s.masks,
        s.plan,
        n_rows,
        weight_dtype=weight_dtype,
        with_bias=bias,
        config=config,
        units=[unit] * len(n_rows),
    )
    assert (db is not None) == bias
    for g, dy in enumerate(s.packed):
        mask = s.indices[g], s.counts[g], s.languages, n_rows[g]
        truth, truth_db = naive_row_weight_grad(dy.double(), s.x.double(), *mask)
        plain, plain_db = naive_row_weight_grad(dy.to(weight_dtype), s.x.to(weight_dtype), *mask)
        assert_close(f"dW{g}", dW[g], truth, plain)
        assert not dW[g][(truth == 0).all(1)].any(), f"dW{g}: rows that no language of the batch owns must be zero"
        if db is not None:
            assert_close(f"db{g}", db[g], truth_db, plain_db)
