"""What the trainer does for an adapter whose weights are yet to be selected: it selects them."""

from __future__ import annotations

import logging
import random
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from graftune.adapters.base.config import config_of
from graftune.adapters.mask_tuning import MaskTuningConfig, is_pending, select
from graftune.integrations.training.base import SomeTrainer

logger = logging.getLogger(__name__)

BATCHES = 8


class SelectingTrainer(SomeTrainer):
    """Mixin for transformers' trainers: masks of a `fraction` are selected when training starts.

    The most important weights are chosen by the task's loss on the first batches of the training
    data, in each process its own share of them. A resumed run has its selection already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Select(self))

    def select_weights(self, loader: Any) -> None:
        """Select the weights of the active adapter, if that has not been done, on some batches."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel) or not is_pending(model, str(model.active_adapter)):
            return
        # A resumed run selects nothing: what is drawn here must not move the run's numbers.
        kept = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng():
                select(model, islice(loader, BATCHES), self._task_loss)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            if hasattr(loader, "end"):
                loader.end()  # accelerate's mark that this is the loader in use
        logger.warning(
            "selected the most important weights by the first batches of the training data: %g of "
            "each tensor's have scores",
            getattr(config_of(model.active_peft_config, MaskTuningConfig), "fraction", None),
        )

    def _task_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        return loss


class _Select(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.select_weights(kwargs["train_dataloader"])
