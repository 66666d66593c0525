"""Code in processes of its own, without Triton's interpreter, in which torch and Triton are there at once."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

# Imports once, and forks for each line it reads: [code, file for what it prints]. Answers with the code's exit status.
SERVER = """
import json, os, sys, traceback
import prepared_launches
import torch._dynamo  # the first launch imports it

for line in sys.stdin:
    code, file = json.loads(line)
    process = os.fork()
    if process == 0:
        opened = os.open(file, os.O_WRONLY)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, whose end of the pipe is closed then."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def recorded(code: str) -> Any:
    """What `code` prints as JSON; `torch`, `tl`, `Recorder` and the kernel `scale` are there."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as file:
        print(json.dumps([f"from recorder_kernels import *\n{code}", file.name]), file=server.stdin, flush=True)
        status = server.stdout.readline().strip()
        printed = file.read().decode()
    assert status == "0", printed
    return json.loads(printed)
