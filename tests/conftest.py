"""What several test folders share: workers, the real treebanks, how Triton kernels are run, the ways to run a batch."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

IN_A_WORKER = "PYTEST_XDIST_WORKER_COUNT" in os.environ
if IN_A_WORKER:
    # Workers share the cores, and so do the processes that they start.
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

if not torch.cuda.is_available():
    # Without a GPU Triton's interpreter runs the kernels; it must be asked for before they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WAYS = ("looped", "filled", "gated")
_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs on all cores; tests that are named run in this process, where `-s` and `--pdb` work.

    Here and not in `addopts`: `make gpu` runs tests on machines without pytest-xdist. Each worker starts with a run of
    neighbouring tests, so nearly all fixtures of modules are made once; one that has ended takes over half of
    another's rest.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not IN_A_WORKER
    if whole and config.pluginmanager.has_plugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = "auto", "worksteal"
        # Sets in the parameters of tests must have one order in all workers, which compare what they have collected.
        os.environ.setdefault("PYTHONHASHSEED", str(random.randrange(2**32)))


@pytest.fixture(scope="session")
def ud_dir() -> Path:
    """Folder of Universal Dependencies treebanks (FASTMASK_UD_DIR); the test is skipped where there is none."""
    folder = Path(os.environ.get("FASTMASK_UD_DIR", _BESIDE_THE_CHECKOUT / "data" / "ud")).expanduser()
    if not folder.is_dir():
        pytest.skip(f"no treebanks in {folder}; set FASTMASK_UD_DIR to a folder of UD_* treebanks")
    return folder


@pytest.fixture(scope="session")
def encoder_dir() -> Path:
    """Folder of a pretrained multilingual encoder, in FASTMASK_MODEL_DIR; the test is skipped where there is none."""
    models = Path(os.environ.get("FASTMASK_MODEL_DIR", _BESIDE_THE_CHECKOUT / "models")).expanduser()
    if not (models / "me5-small-q4").is_dir():
        pytest.skip(f"no me5-small-q4 in {models}; set FASTMASK_MODEL_DIR to the folder that has it")
    return models / "me5-small-q4"


@pytest.fixture(params=WAYS)
def every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every batch runs this way where it is possible, whatever it costs."""
    from fastmask.torch_path import layers, units  # not before Triton knows how to run

    monkeypatch.setattr(layers, "is_cheaper", lambda *batch: request.param == "gated")
    monkeypatch.setattr(units, "MOST_FILLED", float("inf") if request.param == "filled" else units.MOST_FILLED)
    return str(request.param)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `small_data`; nobody writes into it."""
    from finished_run import make_run, write_data

    folder = tmp_path_factory.mktemp("small")
    return make_run(folder / "run", write_data(folder / "data"))


@pytest.fixture(scope="session")
def small_data(small_run: Path) -> Path:
    """The treebanks of `small_run`."""
    return small_run.parent / "data"
