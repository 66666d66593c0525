"""How many layers, heads and neurons a model has: the sizes masks are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """How many units a model has: the trailing sizes of `Subnetworks.heads` and `.neurons`.

    `heads` counts what can be switched off on its own: attention heads, or key/value groups under grouped-query
    attention (a key head and all query heads that read it).
    """

    layers: int
    heads: int
    neurons: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read off a Hugging Face config."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        neurons = getattr(config, "intermediate_size", None) or config.hidden_dim  # hidden_dim is DistilBERT's name
        return cls(config.num_hidden_layers, heads, neurons)
