"""What makes a checkpoint whole: a list of its files with their sizes, written last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"  # every file of a checkpoint with its size: written last
STATE = "trainer_state.json"


def what_is_missing(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks, or None if it is whole.

    A checkpoint without a list of its files was written by another trainer: it needs a state that
    can be read.
    """
    manifest = checkpoint / MANIFEST
    try:
        if not manifest.is_file():
            TrainerState.load_from_json(str(checkpoint / STATE))
            return None
        sizes = json.loads(manifest.read_text())["files"]
        if not isinstance(sizes, Mapping):
            return f"{MANIFEST} has no list of files"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{STATE} or {MANIFEST} cannot be read: {error}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, None if there is none.

    Half-written ones are passed over, each with one line in the log.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("outputs"))
    """
    newest, passed_over = newest_whole(Path(folder))
    for checkpoint, missing in passed_over.items():
        logger.warning("%s is not whole and passed over: %s", checkpoint, missing)
    return newest


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and what each newer one lacks."""
    passed_over: dict[Path, str] = {}
    for checkpoint in sorted(checkpoints(folder), key=_step, reverse=True):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint, passed_over
        passed_over[checkpoint] = missing
    return None, passed_over


def checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in a folder, whole or not, in no order."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path.name.rpartition("-")[2].isdigit():
            yield path


def list_files(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files, once all of them are on the disk."""
    entries = sorted(checkpoint.rglob("*"))
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size for path in entries if path.is_file()
    }
    for path in entries:
        _to_disk(path)
    (checkpoint / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2))
    _to_disk(checkpoint / MANIFEST)
    _to_disk(checkpoint)


def move(written: Path, place: Path) -> None:
    """Move a whole checkpoint to its place in one step.

    What an earlier run left there goes beside it first: should the process die in between, the
    whole one is still in the folder that it was written to.
    """
    if place.exists():
        os.replace(place, written.parent / "replaced")
    os.replace(written, place)
    _to_disk(place.parent)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk: no move may overtake them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
