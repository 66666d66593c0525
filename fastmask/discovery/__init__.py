"""Finding static subnetworks: `scores` says what units are worth, `pruning` drops them and joins several draws by vote.

`gates` multiply what units hand on; scores by gradients are made of their derivatives.
"""

from fastmask.discovery.pruning import VOTES, Draw, Round, Stability, combine, discover, stability
from fastmask.discovery.scores import COMPARING, SCORES, Importance, entropy, importance, relative, shapley

__all__ = [
    "COMPARING", "SCORES", "VOTES", "Draw", "Importance", "Round", "Stability", "combine", "discover",
    "entropy", "importance", "relative", "shapley", "stability",
]  # fmt: skip
