"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows what a head and a neuron are in each Transformer family, `routing` carries the languages of a batch to
the layers, `layers` is the masked layer that reads them there, `attach` puts the three together.
"""

from fastmask.models.attach import attach, detach, freeze_unmasked, language

__all__ = ["attach", "detach", "freeze_unmasked", "language"]
