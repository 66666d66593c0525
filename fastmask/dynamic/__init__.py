"""Dynamic subnetworks: masks that are updated jointly with the model.

`scout` computes all units of the model, dead ones too, and reads their gates' gradients; `swap` turns these into new
masks; `history` remembers the masks that were; `dynamic` joins them.
"""

from fastmask.dynamic.dynamic import STRATEGIES, DynamicSubnetworks
from fastmask.dynamic.history import Snapshot
from fastmask.dynamic.scout import Scouted, scout

__all__ = ["STRATEGIES", "DynamicSubnetworks", "Scouted", "Snapshot", "scout"]
