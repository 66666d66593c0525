"""Finding static subnetworks: `importance` scores units, `pruning` drops them, `combining` joins several draws.

`entropy`, `relative` and `shapley` are other scores.
"""

from fastmask.discovery.combining import VOTES, Draw, Stability, combine, stability
from fastmask.discovery.entropy import entropy
from fastmask.discovery.importance import Importance, importance
from fastmask.discovery.pruning import COMPARING, SCORES, Round, discover, live_units
from fastmask.discovery.quality import Quality
from fastmask.discovery.relative import relative
from fastmask.discovery.shapley import shapley

__all__ = [
    "COMPARING",
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
    "relative",
    "shapley",
    "stability",
]
