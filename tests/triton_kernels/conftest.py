"""What the tests of launches share: devices that are only a number."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the current device, which PyTorch's device guards change."""
    current = [0]

    def exchange(index: int) -> int:
        before = current[0]
        if index >= 0:
            current[0] = index
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current
