"""Tiny runs and a tiny comparison, made once; nobody writes into them but a report into its own folder."""

from __future__ import annotations

import pytest
from tiny_runs import COMPARISON, TRAINING, make_comparison, make_run

from fastmask.tasks.data.synthetic import write_treebanks


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ud")
    write_treebanks(folder, sentences={"train": 24, "dev": 6, "test": 12})
    return folder


@pytest.fixture(scope="session")
def static_run(tmp_path_factory, data):
    """A run of method static that kept all of its checkpoints: steps 2, 3 (the switch), 4 and 6."""
    return make_run(tmp_path_factory.mktemp("static") / "static", data, "static", keep_checkpoints=0)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory, data):
    return make_run(tmp_path_factory.mktemp("full") / "full", data, "full", checkpoint_every=0)


@pytest.fixture(scope="session")
def dynamic_run(tmp_path_factory, data):
    return make_run(tmp_path_factory.mktemp("dynamic") / "dynamic", data, "dynamic")


@pytest.fixture(scope="session")
def comparison(tmp_path_factory, data):
    """Methods full and static, two seeds, three unseen languages."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return make_comparison(out, data, COMPARISON, TRAINING)
