"""A loss that is not finite ends the training in one line, with the checkpoints as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from graftune.adapters.base.messages import listing
from graftune.integrations.training.base import SomeTrainer


class FiniteLoss(SomeTrainer):
    """Mixin for transformers' trainers: stops at the first batch whose loss is not finite.

    Weights that are not finite, which a finite loss with overflowing gradients leaves behind, are
    not written to a checkpoint: the last one is a good one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch = _BatchCounter()
        self.add_callback(self._batch)

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
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batch.number += 1
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(loss, inputs))
        return loss

    def _not_finite(self, loss: Tensor, inputs: Mapping[str, Any]) -> str:
        state, args = self.state, self.args
        bad = [text for name, value in inputs.items() if (text := _where_not_finite(name, value))]
        advice = f"the batch's {' and '.join(bad)}: look at the data" if bad else self._slower()
        process = f" of process {args.process_index}" if args.world_size > 1 else ""
        return (
            f"the loss is {loss.item()} at step {state.global_step + 1} of {state.max_steps}, "
            f"batch {self._batch.number}{process} of epoch {int(state.epoch or 0) + 1}: {advice}; "
            f"the last checkpoint in {args.output_dir} is unharmed"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trained: Any = self.model
        bad = [n for n, p in trained.named_parameters() if p.requires_grad and not _is_finite(p)]
        if bad:
            state, args = self.state, self.args
            raise FloatingPointError(
                f"{len(bad)} trained tensors are not finite after step {state.global_step} of "
                f"{state.max_steps} ({listing(bad, 2)}), though its loss was: {self._slower()}; "
                f"nothing was written, and the last checkpoint in {args.output_dir} is unharmed"
            )
        super()._save_checkpoint(model, trial)

    def _slower(self) -> str:
        rate = self._get_learning_rate()
        return f"lower learning_rate (now {rate:.3g}) or warm it up"


class _BatchCounter(TrainerCallback):
    """Counts the batches of an epoch, also of one that is resumed in its middle."""

    def __init__(self) -> None:
        self.number = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader: Any = kwargs.get("train_dataloader")
        batches = len(loader) if hasattr(loader, "__len__") else 0
        self.number = round((state.epoch or 0.0) % 1 * batches)


def _is_finite(parameter: nn.Parameter) -> bool:
    finite = parameter.detach().isfinite().all()
    # Of a sharded parameter every process has to see the same answer.
    return bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite)


def _where_not_finite(name: str, value: Any) -> str | None:
    if not torch.is_tensor(value) or not value.is_floating_point() or value.isfinite().all():
        return None
    rows = (~value.isfinite()).flatten(1).any(1) if value.ndim > 1 else ~value.isfinite()
    numbers = ", ".join(map(str, rows.reshape(-1).nonzero().flatten().tolist()[:8]))
    return f"{name} is not finite in row {numbers}"
