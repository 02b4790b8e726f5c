"""transformers' training arguments as options of `graftune train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from graftune.integrations.schedules import cosine_rates

# What is said of training arguments that do nothing here.
ELSEWHERE = {
    "resume_from_checkpoint": "Say `resume`: a checkpoint, or auto.",
    "do_train": "`graftune train` always trains.",
    "do_eval": "Say `eval_strategy` to measure while training; it is measured before and after.",
    "do_predict": "Say `graftune eval` to measure an adapter.",
}


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' training arguments without those that only scripts of its own read."""

    _argument_group_name = "options of transformers.TrainingArguments"

    output_dir: str = field(
        default="outputs",
        metadata={"help": "Folder for the adapter, the results, the curves and the checkpoints."},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log, and draw a point of the curves, every so many steps (or share)."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory for data loading. Default: where there is a GPU."},
    )
    resume_from_checkpoint: str | None = field(default=None, init=False)
    do_train: bool = field(default=False, init=False)
    do_eval: bool = field(default=False, init=False)
    do_predict: bool = field(default=False, init=False)

    def epoch_rates(self, first: float | None) -> list[float] | None:
        """Return the learning rate of each epoch where the first has its own, else None."""
        epochs = math.ceil(self.num_train_epochs)
        return None if first is None else cosine_rates(epochs, self.learning_rate, first)
