"""Error messages that name what was given, what was expected and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastmaskKeyError(KeyError):
    """A KeyError whose message prints as it was written (KeyError itself prints its repr)."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of `choices` that look most like `name`, whatever the case of letters; best first."""
    lower: dict[str, list[str]] = {}
    for choice in map(str, choices):
        lower.setdefault(choice.lower(), []).append(choice)
    close = difflib.get_close_matches(str(name).lower(), lower, n=limit, cutoff=0.4)
    return [choice for found in close for choice in lower[found]][:limit]


def unknown(kind: str, given: object, choices: Iterable[str]) -> FastmaskKeyError:
    """Build (not raise) the error for a name that is not one of `choices`.

    `unknown("language", "dee", ["de", "en"])` reads "unknown language 'dee'; did you mean 'de'? Known: de, en".
    """
    known = sorted(str(choice) for choice in choices)
    close = nearest(str(given), known)
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else "."
    shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    return FastmaskKeyError(f"unknown {kind} {given!r}{hint} Known: {shown or 'none'}")
