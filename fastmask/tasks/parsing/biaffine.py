"""Biaffine scores of arcs and labels, and the best tree that scores of arcs allow.

Source: Dozat and Manning 2017, "Deep Biaffine Attention for Neural Dependency Parsing". Trees are found by
Chu-Liu/Edmonds in C++ (`ufal.chu_liu_edmonds`); this file adds batches, padding and the rule that one word alone hangs
from the root, which Universal Dependencies and the official scorer demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from ufal.chu_liu_edmonds import chu_liu_edmonds

NEVER = -1e9  # score of an arc that cannot be; finite, so that differences of two such scores are not NaN


def _perceptron(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """One hidden layer before the bilinear form, as in the source."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.GELU(), nn.Dropout(dropout))


class ArcScorer(nn.Module):
    """Scores every head for every word: s[i, j] = d_i' U h_j + u' h_j."""

    def __init__(self, hidden: int, size: int, dropout: float) -> None:
        super().__init__()
        self.dependent = _perceptron(hidden, size, dropout)
        self.head = _perceptron(hidden, size, dropout)
        self.bilinear = nn.Linear(size, size, bias=False)
        self.prior = nn.Linear(size, 1, bias=False)
        nn.init.zeros_(self.bilinear.weight)  # all heads alike at first: the loss starts at log W, not at 20
        nn.init.zeros_(self.prior.weight)

    def forward(self, states: torch.Tensor, word_mask: torch.Tensor) -> torch.Tensor:
        """Return float32 [B, W, W + 1]: column 0 is the root, column j the j-th word.

        Padding columns and the arc of a word to itself score -1e9; rows of padding words mean nothing.

        Args:
            states: [B, W + 1, D], the root's state first.
            word_mask: bool [B, W].
        """
        dependents = self.bilinear(self.dependent(states[:, 1:]))
        heads = self.head(states)
        scores = (dependents @ heads.transpose(1, 2) + self.prior(heads).transpose(1, 2)).float()
        W = word_mask.shape[1]
        possible = torch.cat([word_mask.new_ones(len(word_mask), 1), word_mask], dim=1)[:, None, :]
        itself = torch.ones(W, W + 1, dtype=torch.bool, device=states.device).triu(1).tril(1)
        return scores.masked_fill(~possible | itself, NEVER)


class LabelScorer(nn.Module):
    """Scores every label of a given arc: s[r] = [d; 1]' U_r [h; 1]."""

    def __init__(self, hidden: int, size: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.dependent = _perceptron(hidden, size, dropout)
        self.head = _perceptron(hidden, size, dropout)
        self.forms = nn.Parameter(torch.zeros(labels, size + 1, size + 1))

    def forward(
        self, states: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, heads: torch.Tensor
    ) -> torch.Tensor:
        """Return float32 [n, R], the label scores of n arcs; nothing is computed for any other arc.

        Args:
            states: [B, W + 1, D], the root's state first.
            rows: int64 [n], the sentence of every arc.
            words: int64 [n], its dependent, 1..W.
            heads: int64 [n], its head, 0..W.
        """
        R, size = self.forms.shape[0], self.forms.shape[1]
        dependents = self.dependent(states[rows, words])
        # The perceptron runs once per position, the gather comes after it: a head has several dependents.
        chosen = self.head(states)[rows, heads]
        one = dependents.new_ones(len(rows), 1)
        left = torch.cat([dependents, one], dim=1)
        right = torch.cat([chosen, one], dim=1)
        forms = self.forms.permute(1, 0, 2).reshape(size, R * size)
        # A product and a sum: a fifth faster on a CPU than the batch of tiny matrix products it is.
        return ((left @ forms.to(left.dtype)).view(-1, R, size) * right[:, None]).sum(-1).float()


def maximum_spanning_trees(
    scores: npt.ArrayLike, lengths: Sequence[int] | npt.NDArray[Any]
) -> list[npt.NDArray[np.int32]]:
    """Return the best tree with one root for every sentence of a batch.

    Args:
        scores: [B, W, W+1], any real dtype (computed in float64). ``scores[b, i, j]`` is the score of word j as the
            head of word i+1; column 0 is the root. Cells past a sentence's length and of a word with itself are not
            read, so they may hold anything.
        lengths: B word counts, each in 0..W.

    Returns:
        B arrays of int32; array b has ``lengths[b]`` heads, 0 for the root, j for the j-th word (from 1).

    Raises:
        ValueError: a shape or a length is wrong, or a score that is read is NaN, infinite or too large to add up.
    """
    values = np.asarray(scores)
    if values.ndim != 3 or values.shape[2] != values.shape[1] + 1:
        raise ValueError(f"scores have shape {values.shape} (expected [B, W, W+1]: dependents by root and heads)")
    if len(lengths) != values.shape[0]:
        raise ValueError(f"{len(lengths)} lengths for {values.shape[0]} sentences (expected one each)")
    trees = []
    for sentence, length in enumerate(int(length) for length in lengths):
        if not 0 <= length <= values.shape[1]:
            raise ValueError(f"length {length} of sentence {sentence} is out of range (expected 0..{values.shape[1]})")
        trees.append(_tree(values[sentence, :length, : length + 1].astype(np.float64), sentence))
    return trees


def _tree(scores: npt.NDArray[np.float64], sentence: int) -> npt.NDArray[np.int32]:
    """Return the best one-root tree of one sentence: `scores` is [n, n+1], owned by the caller and overwritten."""
    n = len(scores)
    if n == 0:
        return np.zeros(0, np.int32)
    scores[np.arange(n), np.arange(1, n + 1)] = scores[:, 0]  # a word with itself is no arc: any finite value will do
    if not np.isfinite(scores).all():
        word, head = (int(index) for index in np.argwhere(~np.isfinite(scores))[0])
        value = scores[word, head]
        raise ValueError(
            f"score of sentence {sentence}, word {word + 1}, head {head} is {value} (expected a finite number)"
        )

    # Why one penalty makes "one root" exact. Every tree has n arcs, so taking the minimum off every score takes the
    # same from every tree, and all scores then lie in [0, r]. Take c = 2nr + (1 if r = 0) off every root arc as well.
    # A tree with one root now totals at least 0 - c, a tree with k >= 2 roots at most nr - 2c < -c, because nr < c. So
    # the best tree has one root; and all trees with one root lose the same c, so their order is the original one.
    # In float64 sums stay exact to about 2nr * 2**-53: below the resolution of float32 scores for any real sentence.
    with np.errstate(over="ignore"):
        scores -= scores.min()
        penalty = 2.0 * n * scores.max() or 1.0
    if not np.isfinite(penalty):
        raise ValueError(f"scores of sentence {sentence} span a range too large to add up in float64")
    square = np.zeros((n + 1, n + 1))  # the library wants a row for the root as well, and never reads it
    square[1:] = scores
    square[1:, 0] -= penalty
    heads, _ = chu_liu_edmonds(square)
    return np.asarray(heads[1:], np.int32)
