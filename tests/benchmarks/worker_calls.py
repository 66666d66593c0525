"""What a worker is asked for in tests; imports nothing, as each new process would."""

from __future__ import annotations

import os
import time


def call(what: str) -> int:
    """End as asked, or return the number of the process."""
    if what == "fails":
        raise ValueError("it is wrong\nas the next line says")
    if what == "crashes":
        os._exit(11)
    if what == "hangs":
        time.sleep(60)
    return os.getpid()
