"""What a run is trained on, as digests that go into its checkpoints: a resumed run must see the very same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from fastmask.subnetworks import Subnetworks
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.evaluation import Prepared
from fastmask.tasks.parsing.vocabulary import Vocabulary
from fastmask.training.config import TrainConfig

__all__ = ["MASKS_INPUT", "inputs_of", "masks_input"]

MASKS_INPUT = "masks file"


def inputs_of(
    vocabulary: Vocabulary, train: Mapping[str, Encoded], dev: Mapping[str, Prepared], config: TrainConfig
) -> dict[str, str]:
    """What a run is trained on and scored on meanwhile -> SHA-256.

    Of sentences counts what the parser sees of them: words, tags, heads and labels, in their order.
    """
    return {
        **{f"training data of {code}": _digest(vocabulary, encoded) for code, encoded in train.items()},
        **{f"dev data of {code}": _digest(vocabulary, prepared.encoded) for code, prepared in dev.items()},
        **masks_input(config),
    }


def masks_input(config: TrainConfig) -> dict[str, str]:
    """The same of the masks that are given to a run, if any are: of what they say, as equal ones differ in bytes."""
    if config.masks is None or config.method == "full":
        return {}
    subnets = Subnetworks.load(config.masks)
    kinds = {"heads": subnets.heads, "neurons": subnets.neurons, **(subnets.weights or {})}
    digest = hashlib.sha256(repr(subnets.languages).encode())
    for name, keep in sorted(kinds.items()):
        if keep is not None:
            digest.update(f"{name} {tuple(keep.shape)} ".encode() + keep.numpy().tobytes())
    return {MASKS_INPUT: digest.hexdigest()}


def _digest(vocabulary: Vocabulary, encoded: Encoded) -> str:
    digest = hashlib.sha256()
    for numbers in (encoded.word_start, encoded.unit_start, encoded.units, encoded.heads):
        digest.update(numbers.astype("<i8").tobytes())
    # By name: one label more in one language moves the numbers of all.
    for ids, names in ((encoded.upos, ["", *vocabulary.upos]), (encoded.deprels, [*vocabulary.deprels, ""])):
        known = np.where(ids < 0, len(names) - 1, ids)
        digest.update("\t".join(np.array(names, dtype=object)[known]).encode())
    return digest.hexdigest()
