"""Training checkpoints that are whole or not there: written aside, put in place in one move."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"  # every file of a checkpoint with its size: written last
ASIDE = ".incomplete"
_STATE = "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or the one to resume from is not whole."""


def what_is_missing(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks, or None if it is whole.

    A checkpoint without a list of its files was written by another trainer: it needs a state that
    can be read.
    """
    manifest = checkpoint / MANIFEST
    try:
        if not manifest.is_file():
            TrainerState.load_from_json(str(checkpoint / _STATE))
            return None
        sizes = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{_STATE} or {MANIFEST} cannot be read: {error}"
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
    for checkpoint in sorted(_checkpoints(Path(folder)), key=_step, reverse=True):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint
        logger.warning("%s is not whole and passed over: %s", checkpoint, missing)
    return None


def _checkpoints(folder: Path) -> Iterator[Path]:
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path.name.rpartition("-")[2].isdigit():
            yield path


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class WholeCheckpoints:
    """Mixin for transformers' trainers: checkpoints are written aside and moved into place at once.

    A process that is killed, a full disk or a lost machine leaves the checkpoints before it as they
    were; `resume_from_checkpoint=True` takes the newest one that is whole.
    """

    _aside: Path | None = None
    _pushed_later: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train as transformers does; True resumes from the newest whole checkpoint.

        Raises:
            CheckpointError: the checkpoint to resume from is not whole.
        """
        folder = Path(self._get_output_dir(None))
        if self.args.should_save and (folder / ASIDE).exists():  # type: ignore[attr-defined]
            logger.warning("removing %s, a checkpoint that was being written", folder / ASIDE)
            shutil.rmtree(folder / ASIDE)
        if resume_from_checkpoint is True:
            # None for an empty folder: transformers then says so in its own words.
            resume_from_checkpoint = last_checkpoint(folder) or True
        if isinstance(resume_from_checkpoint, (str, Path)):
            missing = what_is_missing(Path(resume_from_checkpoint))
            if missing is not None:
                raise CheckpointError(
                    f"cannot resume from {resume_from_checkpoint}: {missing}. Take another one, or "
                    "resume_from_checkpoint=True for the newest whole one."
                )
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is being written, everything goes aside.
        return str(self._aside or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # type: ignore[attr-defined]
        self._aside = run_dir / ASIDE
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
            if self.args.should_save:  # type: ignore[attr-defined]
                self._finish(self._aside / name, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._aside, ignore_errors=True)
            raise CheckpointError(self._could_not_write(run_dir, name, error)) from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
        self._after_moving(run_dir, run_dir / name)

    def _finish(self, written: Path, place: Path) -> None:
        """Name the place in the state, list the files, and move the folder there in one step."""
        state = self.state  # type: ignore[attr-defined]
        if state.best_model_checkpoint == str(written):
            state.best_model_checkpoint = str(place)
            state.save_to_json(str(written / _STATE))
        files = sorted(path for path in written.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(written)): path.stat().st_size for path in files}
        (written / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2))
        for path in [*files, written / MANIFEST]:
            _to_disk(path)
        if place.exists():  # of an earlier run that was not resumed
            os.replace(place, written.parent / "replaced")
        os.replace(written, place)
        _to_disk(place.parent)
        shutil.rmtree(written.parent, ignore_errors=True)

    def _after_moving(self, run_dir: Path, place: Path) -> None:
        state, args = self.state, self.args  # type: ignore[attr-defined]
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.exists():
            state.best_model_checkpoint = str(best)
        if self._pushed_later is not None:
            self._pushed_later = None
            super()._push_from_checkpoint(str(place))  # type: ignore[misc]
        if args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is not None:
            self._pushed_later = Path(checkpoint_folder)
        else:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _could_not_write(self, run_dir: Path, name: str, error: BaseException) -> str:
        last = last_checkpoint(run_dir)
        kept = f"the last good one is {last}" if last else "there is none before it"
        free = shutil.disk_usage(run_dir).free / 2**20
        reason = " ".join(str(error).split())[:300]
        return (
            f"could not write {name} to {run_dir} ({reason}); {kept}. {free:,.0f} MiB are free "
            "there: make room or choose another output_dir, then train with "
            "resume_from_checkpoint=True"
        )


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk: no move may overtake them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
