"""Biaffine scores of arcs and labels.

Source: Dozat and Manning 2017, "Deep Biaffine Attention for Neural Dependency Parsing".
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ArcScorer", "LabelScorer"]

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
        """Build two perceptrons hidden -> size and the form between them."""
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
        """Build two perceptrons hidden -> size and one form per label."""
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
