"""What a process that measures is asked for in tests."""

from __future__ import annotations

import os
import time

from made_rows import made_row

from benchmarks.row import Job, Row


def call(job: Job, seconds: float) -> list[Row]:
    """End as the job's first name says, or return a row with the number of the process."""
    (what,) = job.names
    if what == "fails":
        raise ValueError("it is wrong\nas the next line says")
    if what == "crashes":
        os._exit(11)
    if what == "hangs":
        time.sleep(60)
    return [made_row(note=str(os.getpid()))]
