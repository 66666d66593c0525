"""Masks of a whole model, one subnetwork for each language: holding, storing, finding and comparing them."""

from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["Subnetworks"]
