"""Names that several processes write down together, each once."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from pathlib import Path


class Ledger:
    """Names in the order they were met, kept by a process and the loader workers it starts.

    They are lines of a temporary file, which forked and spawned workers append to alike and which
    outlives them from epoch to epoch. It is removed with the ledger.
    """

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="graftune-", suffix=".jsonl")
        os.close(handle)
        self.file = Path(name)
        weakref.finalize(self, _remove, self.file, os.getpid())

    def add(self, name: str) -> bool:
        """Write a name down, and return whether it was new."""
        if name in self.names():
            return False
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(name) + "\n")
        return True

    def names(self) -> list[str]:
        """Return all names so far, each once."""
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(json.loads(line) for line in lines))


def _remove(file: Path, owner: int) -> None:
    if os.getpid() == owner:
        file.unlink(missing_ok=True)
