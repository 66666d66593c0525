"""The parser of a run, as training left it or as it was at a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastmask.files import FileError, read_tensors
from fastmask.models import attach
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.parsing.batch import Batch
from fastmask.tasks.parsing.parser import Parser
from fastmask.training.checkpoints import MASKS
from fastmask.training.device import device_of
from fastmask.training.finished import load_run

__all__ = ["parser_at", "parser_of", "sentence_losses"]


def parser_of(run: Path, device: str) -> tuple[Parser, Subnetworks | None]:
    """The parser of a finished run, its subnetworks not attached, and these (None for method `full`)."""
    loaded = load_run(run, attached=False)
    return loaded.parser.to(device_of(device)), loaded.subnetworks


def parser_at(run: Path, checkpoint: Path, device: str) -> tuple[Parser, Subnetworks | None]:
    """The parser as it was at a checkpoint, with the subnetworks of that moment attached (None before the switch).

    Raises:
        FileError: the checkpoint's weights are damaged, or not those of the run's parser.
    """
    parser = load_run(run, attached=False).parser
    file = checkpoint / "model.safetensors"
    try:
        parser.load_state_dict(read_tensors(file)[0])
    except RuntimeError as error:  # names or shapes, one a line
        raise FileError(file, " ".join(str(error).split())[:500]) from None
    masks = checkpoint / MASKS
    subnets = Subnetworks.load(masks) if masks.is_file() else None
    if subnets is not None:
        attach(parser.encoder, subnets)
    return parser.to(device_of(device)), subnets


def sentence_losses(parser: Parser, batch: Batch) -> Tensor:
    """The loss of each sentence, [B]: mean over its words of arc and label cross entropy."""
    losses = parser(batch).loss_per_sentence
    assert losses is not None  # rows of treebanks have heads
    return losses
