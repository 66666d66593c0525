"""Finding static subnetworks: `importance` scores units, `pruning` drops them, `combining` joins several draws."""

from fastmask.discovery.combining import VOTES, Draw, combine
from fastmask.discovery.importance import Importance, importance
from fastmask.discovery.pruning import Round, discover, live_units
from fastmask.discovery.quality import Quality, measure

__all__ = [
    "VOTES",
    "Draw",
    "Importance",
    "Quality",
    "Round",
    "combine",
    "discover",
    "importance",
    "live_units",
    "measure",
]
