"""Finding static subnetworks: `importance` scores units, `pruning` drops them, `combining` joins several seeds."""

from fastmask.discovery.combining import combine
from fastmask.discovery.importance import Importance, importance
from fastmask.discovery.pruning import Round, discover

__all__ = ["Importance", "Round", "combine", "discover", "importance"]
