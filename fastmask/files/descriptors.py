"""Names of files that are open already: standard output, or what a shell hands over as ``/dev/fd/63``."""

from __future__ import annotations

import os
import re

__all__ = ["descriptor_of"]

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_NUMBERED = re.compile(r"/(?:dev|proc/self)/fd/([0-9]+)")
_LINKS = 40  # as many as Linux follows


def descriptor_of(path: str | os.PathLike[str]) -> int | None:
    """The number of the open file that a path stands for, perhaps through links; None for any other path.

    Such a file must not be opened again, nor replaced: a shell's ``>>`` would lose what is in it, and a socket cannot
    be opened at all.
    """
    name = os.path.abspath(path)
    for _ in range(_LINKS):
        if name in _STANDARD:
            return _STANDARD[name]
        if number := _NUMBERED.fullmatch(name):
            return int(number[1])
        if not os.path.islink(name):
            break
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None
