"""Training checkpoints that are whole or not there: written aside, put in place in one move."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from graftune.adapters.base.checkpoint import training_checkpoint
from graftune.integrations.training.base import SomeTrainer
from graftune.integrations.training.transformers_private import rotate_checkpoints
from graftune.integrations.training.whole import (
    STATE,
    checkpoints,
    last_checkpoint,
    list_files,
    move,
    newest_whole,
    what_is_missing,
)

logger = logging.getLogger(__name__)

ASIDE = ".incomplete"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or the one to resume from is not whole."""


class WholeCheckpoints(SomeTrainer):
    """Mixin for transformers' trainers: checkpoints are written aside and moved into place at once.

    A process that is killed, a full disk or a lost machine leaves the checkpoints before it as they
    were; `resume_from_checkpoint=True` takes the newest one that is whole.
    """

    _aside: Path | None = None
    _pushed_later: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; True resumes from the newest whole checkpoint.

        Raises:
            CheckpointError: the checkpoint to resume from is not whole, or there is none.
        """
        trial = args[0] if args else kwargs.get("trial")
        folder = Path(self._get_output_dir(trial))
        if self.args.should_save:
            clear_aside(folder)
        # The first process looks and decides: half-written folders are named once, and all resume
        # from the same one.
        decided: list[Any] = [None]
        if self.args.process_index == 0:
            decided = [_to_resume_from(folder, resume_from_checkpoint)]
        if self.args.world_size > 1:
            broadcast_object_list(decided)
        if isinstance(decided[0], CheckpointError):
            raise decided[0]
        return super().train(decided[0], *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do an epoch, unless the run was resumed from its last step, within an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        # transformers would do one step more before it looks.
        self.control.should_training_stop = True
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is being written, everything goes aside.
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._aside = run_dir / ASIDE
        try:
            with training_checkpoint():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish(self._aside / name, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            message = _could_not_write(run_dir, name, error)
            shutil.rmtree(self._aside, ignore_errors=True)
            raise CheckpointError(message) from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        self._after_moving(run_dir, run_dir / name)

    def _finish(self, written: Path, place: Path) -> None:
        """Name the place in the state, list the files, and move the folder there in one step."""
        state = self.state
        if state.best_model_checkpoint == str(written):
            state.best_model_checkpoint = str(place)
            state.save_to_json(str(written / STATE))
        list_files(written)
        move(written, place)
        shutil.rmtree(written.parent, ignore_errors=True)

    def _after_moving(self, run_dir: Path, place: Path) -> None:
        state, args = self.state, self.args
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.exists():
            state.best_model_checkpoint = str(best)
        if self._pushed_later is not None:
            self._pushed_later = None
            super()._push_from_checkpoint(str(place))
        if args.should_save:
            rotate_checkpoints(str(run_dir), args.save_total_limit, state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is not None:
            self._pushed_later = Path(checkpoint_folder)
        else:
            super()._push_from_checkpoint(checkpoint_folder)


def clear_aside(folder: Path) -> None:
    """Remove what a killed run was writing; a checkpoint that only lacked its move is moved."""
    aside = folder / ASIDE
    if not aside.exists():
        return
    for written in checkpoints(aside):
        place = folder / written.name
        if what_is_missing(written) is None and not place.exists():
            move(written, place)
            logger.warning("%s was whole and not yet in its place: moved there", place)
            shutil.rmtree(aside)
            return
    logger.warning("removing %s, a checkpoint that was being written", aside)
    shutil.rmtree(aside)


def _to_resume_from(folder: Path, given: Any) -> str | CheckpointError | None:
    """Return the checkpoint to resume from, or what is wrong with the one that was asked for."""
    if not given:
        return None
    if given is not True:
        missing = what_is_missing(Path(given))
        return (
            str(given)
            if missing is None
            else CheckpointError(
                f"cannot resume from {given}: {missing}. Take another one, or "
                "resume_from_checkpoint=True for the newest whole one."
            )
        )
    newest = last_checkpoint(folder)
    if newest is not None:
        return str(newest)
    broken = len(list(checkpoints(folder)))
    why = f"none of the {broken} there is whole" if broken else "there is none"
    return CheckpointError(
        f"no checkpoint to resume from in {folder}: {why}. Give the right output_dir, or start "
        "anew; resume_from_checkpoint=graftune.last_checkpoint(output_dir) starts anew where there "
        "is nothing to resume."
    )


def _could_not_write(run_dir: Path, name: str, error: BaseException) -> str:
    last, _ = newest_whole(run_dir)
    kept = f"the last good one is {last}" if last else "there is none before it"
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**20
    reason = " ".join(str(error).split())[:300]
    return (
        f"could not write {name} to {run_dir} ({reason}); {kept}. {free:,.0f} MiB are free there: "
        "make room or choose another output_dir, then train with resume_from_checkpoint=True"
    )
