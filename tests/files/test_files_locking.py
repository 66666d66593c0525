"""A folder is held by one process; who holds it is named, and nothing outside it is touched."""

from __future__ import annotations

import os
import time

import pytest
from processes import FORKSERVER, start_process

import fastmask.files as files


def hold(folder, mine):
    with files.held(folder):
        mine.set()
        time.sleep(600)


def test_the_other_is_named(tmp_path):
    """A folder that another process holds is refused with that process's number, and free when it has ended."""
    mine = FORKSERVER.Event()
    other = start_process(hold, tmp_path, mine)
    assert mine.wait(300)
    with pytest.raises(files.HeldError, match=f"is in use by process {other.pid} on "), files.held(tmp_path):
        pass
    other.kill()
    other.join()
    with files.held(tmp_path):
        pass
    with files.held(tmp_path):  # and it lets go
        pass


def test_a_damaged_name(tmp_path):
    """The file that names the holder may hold anything: the refusal stays the same."""
    with files.held(tmp_path):
        (tmp_path / ".holder.json").unlink()
        os.mkfifo(tmp_path / ".holder.json")
        with pytest.raises(files.HeldError, match="is in use by another process"), files.held(tmp_path):
            pass


@pytest.mark.parametrize("name", [".lock", ".holder.json"])
def test_links_lead_nowhere(tmp_path, name):
    """A folder of somebody else cannot make us empty or replace a file outside it."""
    (tmp_path / "precious").write_text("old")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("../precious")
    with pytest.raises(OSError, match="is a link"), files.held(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "precious").is_symlink()
