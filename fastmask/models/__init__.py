"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows what a head and a neuron are in each Transformer family, `language_arguments` what a call says about
languages, `entry` takes that from calls, `routing` carries the languages of a batch to the layers, `layers` is the
masked layer that reads them there, `attach` puts these together. `collator` makes language ids of a dataset's column.
"""

from fastmask.models.attach import attach, detach, language, set_language
from fastmask.models.collator import LanguageCollator

__all__ = ["LanguageCollator", "attach", "detach", "language", "set_language"]
