"""A loss that is not finite ends the training in one line, with the checkpoints as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class FiniteLoss:
    """Mixin for transformers' trainers: stops at the first batch whose loss is not finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch = _BatchCounter()
        self.add_callback(self._batch)  # type: ignore[attr-defined]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do the trainer's step.

        Raises:
            FloatingPointError: the loss is not finite; names the batch and says what to do.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._batch.number += 1
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(loss, inputs))
        return loss

    def _not_finite(self, loss: Tensor, inputs: Mapping[str, Any]) -> str:
        state, args = self.state, self.args  # type: ignore[attr-defined]
        rate = self._get_learning_rate()  # type: ignore[attr-defined]
        bad = [text for name, value in inputs.items() if (text := _where_not_finite(name, value))]
        advice = (
            f"the batch's {' and '.join(bad)}: look at the data"
            if bad
            else f"lower learning_rate (now {rate:.3g}) or warm it up"
        )
        return (
            f"the loss is {loss.item()} at step {state.global_step + 1} of {state.max_steps}, "
            f"batch {self._batch.number} of epoch {int(state.epoch or 0) + 1}: {advice}; the last "
            f"checkpoint in {args.output_dir} is unharmed"
        )


class _BatchCounter(TrainerCallback):
    """Counts the batches of an epoch, also of one that is resumed in its middle."""

    def __init__(self) -> None:
        self.number = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader = kwargs.get("train_dataloader")
        batches = len(loader) if hasattr(loader, "__len__") else 0
        self.number = round((state.epoch or 0.0) % 1 * batches)


def _where_not_finite(name: str, value: Any) -> str | None:
    if not torch.is_tensor(value) or not value.is_floating_point() or value.isfinite().all():
        return None
    rows = (~value.isfinite()).flatten(1).any(1) if value.ndim > 1 else ~value.isfinite()
    numbers = ", ".join(map(str, rows.reshape(-1).nonzero().flatten().tolist()[:8]))
    return f"{name} is not finite in row {numbers}"
