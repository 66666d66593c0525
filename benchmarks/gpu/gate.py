"""The correctness gate: the tests that run on a GPU, in several processes side by side.

`repeatable` comes first, alone and with a time limit of its own: what could hang are programs that wait for each other.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["environment", "green", "repeatable", "test_files"]

MOST_PROCESSES = 8
NOTHING_TO_RUN = 5  # pytest's exit code
TURNS = "two_runs_give_the_same_bits"  # the test whose programs take turns


def test_files(root: Path) -> list[str]:
    """The tests of the gate: of the kernels' own those that run on a device.

    Others say how kernels are compiled or chosen, not whether they are right. Without hypothesis, those that need it
    are left out.
    """
    kernels = []
    for path in sorted((root / "tests" / "triton_kernels").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "DEVICE" in text and ("from hypothesis" not in text or importlib.util.find_spec("hypothesis")):
            kernels.append(path)
    paths = [root / "tests" / "gpu", root / "tests" / "triton_path", *kernels]
    return [str(path.relative_to(root)) for path in paths if path.exists()]


def environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of a process that finds the checkout's packages first."""
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"} | more


def repeatable(root: Path, seconds: float) -> bool:
    """Whether two runs give the same bits, in time: programs that wait for the wrong one would wait for ever."""
    return green(root, seconds, [str(Path("tests") / "gpu"), "-k", TURNS], processes=4)


def green(root: Path, seconds: float, files: list[str] | None = None, processes: int | None = None) -> bool:
    """Run the tests and print how they ended; true if every one passed (or was skipped) in time."""
    files = test_files(root) if files is None else files
    if importlib.util.find_spec("hypothesis") is None:
        print("gate: hypothesis is not installed; tests that need it are left out")
    n = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    print(f"gate: {' '.join(files)} in {n} processes", flush=True)
    end, start = time.monotonic() + seconds, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{share}.log" for share in range(n)]
        running = []
        for share, log in enumerate(logs):
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.shard"]
            command += [f"--shard={share}/{n}", "--tb=short", "--maxfail=10", *files]
            env = environment(root, OMP_NUM_THREADS="2")
            with log.open("w") as output:
                running.append(subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT))
        codes: list[int | None] = []
        try:
            for process in running:
                try:
                    codes.append(process.wait(max(0.0, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    codes.append(None)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        texts = [log.read_text(errors="replace") for log in logs]
    for share, (code, text) in enumerate(zip(codes, texts, strict=True)):
        if code not in (0, NOTHING_TO_RUN):
            why = f"over {seconds:.0f} s" if code is None else f"exit code {code}"
            print(f"---- share {share}: {why}\n" + "\n".join(text.splitlines()[-60:])[-6000:])
    passed, failed, skipped = (_count(texts, word) for word in ("passed", "failed", "skipped"))
    print(f"gate: {passed} passed, {failed} failed, {skipped} skipped in {time.monotonic() - start:.0f} s", flush=True)
    return passed > 0 and all(code in (0, NOTHING_TO_RUN) for code in codes)


def _count(texts: list[str], word: str) -> int:
    """Sum of pytest's closing lines."""
    return sum(int(match) for text in texts for match in re.findall(rf"\b(\d+) {word}\b", text[-500:])[-1:])
