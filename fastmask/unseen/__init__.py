"""Unseen languages: choose a subnetwork for a language the model was not trained on, and adapt to a few sentences.

`typology` says how similar two languages are, `choosing` takes a subnetwork, `adapting` draws the sentences and takes
the steps, and `adapted_run` stores the result.
"""

from fastmask.tasks.data.head_direction import direction_profile, direction_similarity
from fastmask.unseen.adapting import OPTIMIZERS, AdaptationDiverged, Pool, adapted, split_pool, support_sets
from fastmask.unseen.choosing import CHOICES, UNION, Choice, choose, support_losses, with_language, with_union
from fastmask.unseen.typology import similarity_measure, uriel_similarity

__all__ = [
    "CHOICES", "OPTIMIZERS", "UNION", "AdaptationDiverged", "Choice", "Pool", "adapted", "choose",
    "direction_profile", "direction_similarity", "similarity_measure", "split_pool", "support_losses", "support_sets",
    "uriel_similarity", "with_language", "with_union",
]  # fmt: skip
