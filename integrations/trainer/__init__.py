"""The trainer: transformers' own, with objectives, regularizers and checkpoints that are whole."""

from graftune.integrations.trainer.checkpoints import CheckpointError, last_checkpoint
from graftune.integrations.trainer.regularized import regularizers_of
from graftune.integrations.trainer.trainer import Trainer, TrainerMixin

__all__ = ["CheckpointError", "Trainer", "TrainerMixin", "last_checkpoint", "regularizers_of"]
