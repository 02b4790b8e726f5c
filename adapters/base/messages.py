"""The words of graftune's errors: what was given, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

_warned: set[str] = set()


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the allowed name nearest to `given`, or an empty string."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def listing(names: Iterable[str], most: int = 12) -> str:
    """Return the first `most` names, quoted and joined, and how many more there are."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:most])
    return text + (f" (+{len(names) - most} more)" if len(names) > most else "")


def warn_once(name: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with `message` the first time that `name` comes up in this process."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(message, category, stacklevel=3)
