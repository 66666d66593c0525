"""Where the tests of tasks keep what `datasets` caches, and the tiny data and models that they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test session."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets-cache"))


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, datasets_cache: None) -> Callable[[str], Path]:
    """Data and a model of one of `tiny_tasks.CASES`, made once; nobody writes there."""
    from tiny_tasks import made

    folder = tmp_path_factory.getbasetemp() / "tiny-tasks"
    return lambda name: made(name, folder)
