"""Tiny runs and a tiny comparison, made once; nobody writes into them but a report into its own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_runs import COMPARISON, TRAINING, make_comparison, make_run

from fastmask.tasks.data.synthetic import write_treebanks

sys.path.append(str(Path(__file__).resolve().parents[1] / "compare"))

from tiny_encoder import tiny_encoder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Treebanks, and beside them an encoder: runs on it take no time to train, to write and to analyse."""
    folder = tmp_path_factory.mktemp("data") / "ud"
    write_treebanks(folder, sentences={"train": 24, "dev": 6, "test": 12})
    tiny_encoder(folder.parent / "encoder", "".join(p.read_text() for p in folder.glob("UD_*/*.conllu")), heads=4)
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
    """Methods full and static, two seeds, three unseen languages; from scratch: seeds have nothing in common."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return make_comparison(out, data, COMPARISON, TRAINING)
