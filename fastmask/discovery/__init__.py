"""Finding static subnetworks: `importance` scores units, `pruning` drops them, `combining` joins several draws.

`entropy` and `shapley` are two other scores.
"""

from fastmask.discovery.combining import VOTES, Draw, Stability, combine, stability
from fastmask.discovery.entropy import entropy
from fastmask.discovery.importance import Importance, importance
from fastmask.discovery.pruning import SCORES, Round, discover, live_units
from fastmask.discovery.quality import Quality, measure
from fastmask.discovery.shapley import shapley

__all__ = [
    "SCORES",
    "VOTES",
    "Draw",
    "Importance",
    "Quality",
    "Round",
    "Stability",
    "combine",
    "discover",
    "entropy",
    "importance",
    "live_units",
    "measure",
    "shapley",
    "stability",
]
