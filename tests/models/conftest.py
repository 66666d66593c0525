"""Models of these tests are so small that a mixed batch of any of them would be multiplied whole."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are packed, unless a test asks for another way (`every_way`)."""
    from fastmask.torch_path import layers  # not before Triton knows how to run

    monkeypatch.setattr(layers, "is_cheaper", lambda *batch: False)
