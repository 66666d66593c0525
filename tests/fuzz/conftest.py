"""How many mutants: some in the normal suite, a thousand in the slow one."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `count` runs short (its `few` marker, or 60) and, marked slow, with 1,000 mutants."""
    if "count" in metafunc.fixturenames:
        few = getattr(metafunc.function, "few", 60)
        metafunc.parametrize("count", [few, pytest.param(1000, marks=pytest.mark.slow)])
