"""Names of transformers and TRL that are not part of their public interface, and their check.

The trainer overrides or calls them where no callback and no public method can do what it needs.
A release that renames one of them would leave an override that is never called: checkpoints would
no longer be complete, or resumed runs no longer exact, without a message. `check_names` therefore
runs when the trainer is imported, and raises for a name that is missing or takes other arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import trainer_utils

WORKING = "transformers>=5.3,!=5.24.0"  # what pyproject.toml asks for

# Methods of transformers.Trainer: the parameters they are called with, and why each is needed.
METHODS: dict[str, tuple[tuple[str, ...], str]] = {
    "_build_accelerator_args": (
        (),
        "DDP must not look for unused parameters under reentrant checkpointing",
    ),
    "_get_collator_with_removed_columns": (
        ("data_collator", "description"),
        "seeds the collator; leaves the columns of the user's collator",
    ),
    "_get_dataloader": (
        ("dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
        "seeds the rows of the training data, also in TRL's trainers",
    ),
    "_get_learning_rate": ((), "the error of a loss that is not finite names the rate"),
    "_get_num_items_in_batch": (
        ("batch_samples", "device"),
        "an objective counts the items of all accumulated batches",
    ),
    "_get_output_dir": (("trial",), "a checkpoint is written to another folder and then moved"),
    "_load_optimizer_and_scheduler": (
        ("checkpoint",),
        "tells from which checkpoint the regularizers' state is read",
    ),
    "_prepare_inputs": (("inputs",), "moves a batch to the device outside of training steps"),
    "_push_from_checkpoint": (
        ("checkpoint_folder",),
        "a checkpoint is uploaded after it was moved",
    ),
    "_remove_unused_columns": (
        ("dataset", "description"),
        "leaves the columns that the user's collator reads",
    ),
    "_run_epoch": ((), "a run resumed from its last step must not do one step more"),
    "_save": (("output_dir", "state_dict"), "gathers sharded adapters; refuses empty ones"),
    "_save_checkpoint": (("model", "trial"), "makes a checkpoint complete or absent"),
    "_save_rng_state": (
        ("output_dir",),
        "every process calls it: it also saves the state of the regularizers",
    ),
    "_set_signature_columns_if_needed": ((), "keeps the columns that an objective reads"),
}

# Attributes that transformers.Trainer sets in its constructor, and why each is needed.
ATTRIBUTES = {
    "_signature_columns": "the columns that an objective reads are added to it",
    "_train_batch_size": "is computed again for one GPU per process",
}

# TRL's SFTTrainer passes this argument to the model to fuse the loss with the output embedding;
# regularizers need the logits, which such a call does not return.
FUSED_LM_HEAD = "fused_lm_head"


def rotate_checkpoints(run_dir: str, save_total_limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints; a new checkpoint counts only after it was moved."""
    trainer_utils.rotate_checkpoints(
        output_dir=run_dir,
        save_total_limit=save_total_limit,
        best_model_checkpoint=best,
        use_mtime=True,
    )


def use_one_gpu(trainer: Any) -> None:
    """Let a trainer use one GPU; TrainingArguments has no public setting for their number."""
    trainer.args._n_gpu = 1
    trainer._train_batch_size = trainer.args.train_batch_size


def check_names(
    trainer: Any = transformers.Trainer, rotate: Callable[..., Any] | None = None
) -> None:
    """Check that transformers still has the private names that graftune's trainer relies on.

    Raises:
        ImportError: a name is missing, or no longer takes the arguments it is called with.
    """
    lost = []
    for name, (parameters, why) in METHODS.items():
        problem = _problem(getattr(trainer, name, None), parameters)
        if problem:
            lost.append(f"Trainer.{name} {problem} ({why})")
    parameters = ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime")
    found = rotate or getattr(trainer_utils, "rotate_checkpoints", None)
    problem = _problem(found, parameters)
    if problem:
        lost.append(f"trainer_utils.rotate_checkpoints {problem} (applies save_total_limit)")
    # They exist on instances only, so the code of the constructor is searched for them.
    set_by_init = inspect.unwrap(trainer.__init__).__code__.co_names
    for name, why in ATTRIBUTES.items():
        if name not in set_by_init:
            lost.append(f"Trainer.{name} is missing ({why})")
    arguments: Any = transformers.TrainingArguments
    if "_n_gpu" not in arguments.n_gpu.fget.__code__.co_names:
        lost.append("TrainingArguments._n_gpu is missing (restricts a process to one GPU)")
    if lost:
        raise ImportError(
            f"graftune's trainer does not work with transformers {transformers.__version__}: "
            f"{'; '.join(lost)}. Install a version that has them: pip install '{WORKING}'"
        )


def _problem(found: Any, parameters: tuple[str, ...]) -> str | None:
    """Return what is wrong with a function that is to take these parameters, None if nothing."""
    if found is None:
        return "is missing"
    taken = inspect.signature(found).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return None
    missing = [name for name in parameters if name not in taken]
    return f"no longer takes {', '.join(missing)}" if missing else None


check_names()
