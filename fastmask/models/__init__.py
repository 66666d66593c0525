"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows how projections are called, `structure` finds a model's heads and neurons by that, `layers` (and
`experts`) makes masked layers of them, `proof` tries these before `attach` puts them in. Then, in a forward pass:
`calls` takes languages from a call's arguments, and `routing` carries them to the layers, whose forward runs them.
"""

from fastmask.models.attach import attach, detach, language

__all__ = ["attach", "detach", "language"]
