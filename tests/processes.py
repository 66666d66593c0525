"""Real processes for tests, in which what takes seconds to import is there at once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest

FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["accelerate", "datasets", "fastmask.compare.plan", "fastmask.training.loop", "torch._dynamo"]
PRELOADED += ["transformers.models.auto", "transformers.models.bert.modeling_bert"]
FORKSERVER.set_forkserver_preload(PRELOADED)


def start_process(target: Any, *args: Any, daemon: bool = True) -> Any:
    """Start a process that may be killed; the modules it needs are imported once, in the server it is forked from.

    A daemon ends with the tests, whatever happens to them, and may have no processes of its own.
    """
    process = FORKSERVER.Process(target=target, args=args, daemon=daemon)
    process.start()
    return process


def fork_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of processes that the library starts are forked from that server, and need not import anything either."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: FORKSERVER)


def start_command(*arguments: object, **streams: IO[Any] | int) -> Any:
    """Start the command in a process whose `stdin`, `stdout` or `stderr` is an open file, or the number of one."""
    files = {name: file if isinstance(file, int) else file.fileno() for name, file in streams.items()}
    # Connections can be sent to a process; nobody reads or writes through them here.
    sent = {name: Connection(os.dup(number)) for name, number in files.items()}
    process = start_process(_command, [str(argument) for argument in arguments], sent)
    for copy in sent.values():
        copy.close()
    return process


def exit_code(process: Any) -> int:
    """That of a process that was started, which must end within a few minutes."""
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the process did not end")
    return int(process.exitcode)


def run_into(stdout: int, target: Any, *args: Any) -> None:
    """Call `target` in a process whose standard output is the open file of that number, as a shell redirects it."""
    with Connection(os.dup(stdout), readable=False) as stream:  # these can be sent to a process
        process = start_process(_redirected, stream, target, *args)
    process.join()
    assert process.exitcode == 0


def run_script(path: Path, folder: Path, *arguments: str) -> None:
    """Run a Python script in a process whose working directory is `folder`; it must end well."""
    process = start_process(_script, path, folder, *arguments)
    process.join()
    assert process.exitcode == 0, "its traceback is in what was captured of standard error"


def _script(path: Path, folder: Path, *arguments: str) -> None:
    os.chdir(folder)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def _command(arguments: list[str], streams: dict[str, Connection]) -> None:
    from fastmask.cli import main

    for name, file in streams.items():
        os.dup2(file.fileno(), ("stdin", "stdout", "stderr").index(name))
        file.close()
    if "stdin" in streams:  # multiprocessing has closed it
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    # Ctrl-C ends this process as it ends a shell's command; what forked it from the server ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments))


def _redirected(stream: Connection, target: Any, *args: Any) -> None:
    os.dup2(stream.fileno(), 1)
    stream.close()
    target(*args)


def piped(target: Any, *args: Any) -> bytes:
    """What `target` writes to standard output in a process where that is a pipe; no more than a pipe holds."""
    read, write = os.pipe()
    with open(read, "rb") as reader:
        try:
            run_into(write, target, *args)
        finally:
            os.close(write)
        return reader.read()
