"""The correctness gate: the tests that run on a GPU, in several processes side by side.

`repeatable` comes first, alone and with a time limit of its own: what could hang are programs that wait for each other.
This module is also pytest's plugin that gives each process its share (`--shard=i/n`), compiling included.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MOST_PROCESSES = 8
PASSED, NOTHING_TO_RUN = 0, 5  # pytest's exit codes
TURNS = "two_runs_give_the_same_bits"  # the test whose programs take turns


def test_files(root: Path) -> list[str]:
    """The tests of the gate: of the kernels' own those that run on a device, without hypothesis if there is none."""
    kernels = []
    for path in sorted((root / "tests" / "triton_kernels").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        launches = "DEVICE" in text or "launches_kernels" in text
        if launches and ("from hypothesis" not in text or importlib.util.find_spec("hypothesis")):
            kernels.append(path)
    paths = [root / "tests" / "gpu", root / "tests" / "triton_path", *kernels]
    return [str(path.relative_to(root)) for path in paths if path.exists()]


def repeatable(root: Path, seconds: float) -> bool:
    """Whether two runs give the same bits, in time: programs that wait for the wrong one would wait for ever."""
    return green(root, seconds, [str(Path("tests") / "gpu"), "-k", TURNS], processes=4)


def green(root: Path, seconds: float, files: Sequence[str] = (), processes: int | None = None) -> bool:
    """Run the tests and print how they ended; true if every one passed (or was skipped) in time."""
    files = files or test_files(root)
    if importlib.util.find_spec("hypothesis") is None:
        print("gate: hypothesis is not installed; tests that need it are left out")
    n = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    print(f"gate: {' '.join(files)} in {n} processes", flush=True)
    start, good, counts = time.monotonic(), True, dict.fromkeys(("passed", "failed", "skipped"), 0)
    with ThreadPoolExecutor(n) as threads:
        shares = [*threads.map(lambda i: _share(f"{i}/{n}", root, files, seconds), range(n))]
    for share, (code, text) in enumerate(shares):
        if code not in (PASSED, NOTHING_TO_RUN):
            good, why = False, f"over {seconds:.0f} s" if code is None else f"exit code {code}"
            print(f"---- share {share}: {why}\n" + "\n".join(text.splitlines()[-60:])[-6000:])
        for word in counts:  # in pytest's closing line
            counts[word] += sum(map(int, re.findall(rf"\b(\d+) {word}\b", text[-500:])[-1:]))
    said = ", ".join(f"{number} {word}" for word, number in counts.items())
    print(f"gate: {said} in {time.monotonic() - start:.0f} s", flush=True)
    return good and counts["passed"] > 0


def _share(share: str, root: Path, files: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Run one share: pytest's exit code, None if it took too long, and what it printed."""
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", __name__, f"--shard={share}"]
    command += ["--tb=short", "--maxfail=10", *files]
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a pipe would wait for processes of tests
        streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        try:
            code = subprocess.run(command, cwd=root, env=env, timeout=max(0.0, seconds), **streams).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        return code, log.read()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", help="i/n: of all tests in order, run every n-th, beginning with the i-th")


def pytest_configure(config: Any) -> None:
    """Let hypothesis try the same examples every time, however long the first one compiles."""
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("gate", deadline=None, derandomize=True, database=None)
        settings.load_profile("gate")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    share, shares = (int(part) for part in config.getoption("--shard").split("/"))
    config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number % shares != share])
    items[:] = items[share::shares]
