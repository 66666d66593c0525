"""What the tests of the commands share: small treebanks on disk, and a small encoder."""

from __future__ import annotations

import pytest

from fastmask.tasks.data.synthetic import write_treebanks
from tests.compare.tiny_encoder import tiny_encoder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of artificial treebanks; nobody writes to it."""
    folder = tmp_path_factory.mktemp("ud")
    write_treebanks(folder, sentences={"train": 40, "dev": 10, "test": 12})
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, data):
    """The options for an encoder that takes no time to train and to write: two layers of four heads, 64 neurons."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_encoder(folder, "".join(path.read_text() for path in data.glob("UD_*/*.conllu")), heads=4)
    return ["--model", str(folder)]
