"""What the tests of the commands share: small treebanks on disk."""

from __future__ import annotations

import pytest

from fastmask.tasks.data.synthetic import write_treebanks


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of artificial treebanks; nobody writes to it."""
    folder = tmp_path_factory.mktemp("ud")
    write_treebanks(folder, sentences={"train": 40, "dev": 10, "test": 12})
    return folder
