"""What several tests of comparisons train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_encoder import tiny_encoder

from fastmask.tasks.data.synthetic import write_treebanks


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Treebanks, and beside them an encoder so small that nothing takes long to write; nobody writes into it."""
    folder = tmp_path_factory.mktemp("data") / "ud"
    write_treebanks(folder, sentences={"train": 12, "dev": 4, "test": 6})
    tiny_encoder(folder.parent / "encoder", "".join(path.read_text() for path in folder.glob("UD_*/*.conllu")))
    return folder
