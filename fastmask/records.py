"""`Record`: what a JSON file of ours holds, as a class with types.

Apart from `fastmask.files`, which reads them: only what has such files needs pydantic. Masks, layers and kernels run
where it is not installed, so that of `Subnetworks` is here, too.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """The base of what a JSON file of ours holds: every field of exactly its type, none missing, none unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


_Size = Annotated[int, Field(ge=1)]


class MasksRecord(Record):
    """What a file of subnetworks says of its tensors: uint8 [L, bytes] each, a unit a bit, the lowest bit first."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    shapes: dict[str, tuple[_Size, _Size, _Size]]  # name of the tensor -> of the mask it stands for
