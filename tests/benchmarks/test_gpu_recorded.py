"""What a layer runs on a GPU: launches and operations are counted, and never become more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: the recorder and Triton's interpreter exclude each other."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of `python -m benchmarks.gpu.recorded`."""
    path = tmp_path_factory.mktemp("recorded") / "counts.json"
    done = run("-m", "benchmarks.gpu.recorded", "--json", str(path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    assert all(name in done.stdout for name in found)
    return found


# (Triton launches, torch operations) of a forward and backward pass of the masked layers, at most; of the plan.
MOST = {
    "BERT layer 768, heads and neurons": ((12, 36), (0, 51)),
    "rows 4096 x 4096, packed": ((3, 5), (0, 70)),
    "rows 4096 x 4096": ((5, 5), (0, 94)),
    "columns 4096 x 4096, packed": ((3, 7), (0, 70)),
    "columns 4096 x 4096": ((6, 7), (0, 94)),
    "blocks 4096 x 4096": ((5, 2), (0, 46)),
    "weights 4096 x 4096": ((3, 1), (0, 46)),
}


def test_the_table_has_these_layers(counts: dict[str, Any]) -> None:
    """A layer is counted that has no bound."""
    assert counts.keys() == MOST.keys()


@pytest.mark.parametrize("layer", MOST)
def test_a_pass_launches_no_more_than_it_did(layer: str, counts: dict[str, Any]) -> None:
    """The host spends longer on launching a layer; whoever lowers a count lowers the bound here."""
    found = counts[layer]
    masked = [sum(both) for both in zip(found["forward"], found["backward"], strict=True)]
    assert (tuple(masked), tuple(found["plan"])) == MOST[layer]
