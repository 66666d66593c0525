"""A pytest plugin: `--shard=i/n` runs every n-th test, so that n processes share the compiling."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add the option."""
    parser.addoption(
        "--shard", default="0/1", help="i/n: of all tests in order, run every n-th, beginning with the i-th"
    )


def pytest_configure(config: Any) -> None:
    """Let hypothesis try the same examples every time, however long the first one compiles."""
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile("gate", deadline=None, derandomize=True, database=None)
    settings.load_profile("gate")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the other shares."""
    share, shares = (int(part) for part in config.getoption("--shard").split("/"))
    kept = items[share::shares]
    config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number % shares != share])
    items[:] = kept
