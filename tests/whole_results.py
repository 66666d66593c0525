"""What a cell of a comparison leaves, made of a few scores: every field that `fastmask.compare.report` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["whole_result"]


def whole_result(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``result.json`` of a cell with these scores; what they do not say is filled in."""
    seconds = dict.fromkeys(("seconds", "training_seconds", "scoring_seconds", "words_per_second"), 1.0)
    counts = dict.fromkeys(("outer_steps", "gradient_passes", "sentences"), 1)
    nothing = {"resumed": False, "density": None, "day": "2026-01-31", "made_by": "a test"}
    rest = {"scores": {"las": 50.0, "uas": 50.0}, "subnetwork": "own", "support_set": None, "steps": 0, "words": 9}
    return {**seconds, **counts, **nothing, "scores": [{**rest, **score} for score in scores]}
