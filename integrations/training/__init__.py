"""The trainer: transformers' own, with objectives, regularizers and checkpoints that are whole."""

from graftune.integrations.training.checkpoints import CheckpointError, last_checkpoint
from graftune.integrations.training.regularized import regularizers_of
from graftune.integrations.training.trainer import Trainer, TrainerMixin

__all__ = ["CheckpointError", "Trainer", "TrainerMixin", "last_checkpoint", "regularizers_of"]
