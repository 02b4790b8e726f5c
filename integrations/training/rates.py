"""Learning rates that a trainer changes from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from graftune.integrations.schedules import epoch_schedule
from graftune.integrations.training.base import SomeTrainer


class EpochRates(SomeTrainer):
    """Mixin for transformers' trainers: each epoch has a learning rate of its own.

    Args:
        epoch_rates: one rate for each epoch (`graftune.integrations.schedules.cosine_rates`), in
            the place of `lr_scheduler_type`; where `max_steps` ends the run, they are spread evenly
            over its steps. None: the training arguments' schedule.

    Raises:
        ValueError: there are not as many rates as epochs.
    """

    def __init__(
        self, *args: Any, epoch_rates: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.epoch_rates = None if epoch_rates is None else list(epoch_rates)
        given, epochs = len(self.epoch_rates or ()), math.ceil(self.args.num_train_epochs)
        if self.epoch_rates is not None and self.args.max_steps <= 0 and given != epochs:
            raise ValueError(
                f"epoch_rates has {given} rates for {epochs} epochs; give one for each, as "
                "cosine_rates(epochs, rate) does"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Return the schedule of the epochs' rates, or the training arguments' own."""
        if self.epoch_rates is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps = math.ceil(num_training_steps / len(self.epoch_rates))
        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = epoch_schedule(chosen, self.epoch_rates, steps)
        return self.lr_scheduler
