"""What the trainer does with regularizers: their terms, gradients, hooks and state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from graftune.adapters.regularizers import Need, Regularization, Regularizer, recorded, regularizer
from graftune.adapters.regularizers.state_file import load_state, save_state

logger = logging.getLogger(__name__)

STATE_FILE = "regularizers.safetensors"


def regularizers_of(model: nn.Module) -> list[Regularizer]:
    """Return the regularizers that the config of a model's active adapter records.

    Example:
        >>> regularizers_of(graftune.wrap(model, "flora", regularizers=[L2ToStart()]))
        [L2ToStart(weight=0.001, of='adapter')]
    """
    return recorded(model.active_peft_config) if isinstance(model, PeftModel) else []


class RegularizedTrainer:
    """Mixin for transformers' trainers and TRL's: trains with regularizers.

    Terms are added to whatever loss the trainer computes; each is logged by its name, beside
    "task_loss". The state of the regularizers is in every checkpoint.

    Args:
        regularizers: objects, or dicts with their name and settings. None takes those that the
            adapter's config records; an empty list trains without.
    """

    def __init__(
        self,
        *args: Any,
        regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        model: nn.Module = self.model  # type: ignore[attr-defined]
        if regularizers is None:
            chosen = regularizers_of(model)
        else:
            chosen = [regularizer(given) for given in regularizers]
        self.regularization = Regularization(model, chosen)
        self.regularization.check()
        self._terms: dict[str, Tensor] = {}  # sums since they were logged
        self._logged_at = 0
        self._resumed_from: str | None = None
        self.add_callback(_Hooks(self))  # type: ignore[attr-defined]

    # Losses.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss and, in training, the regularizers' terms added to it."""
        compute = super().compute_loss  # type: ignore[misc]
        if not (model.training and self.regularization.regularizers):
            return compute(model, inputs, return_outputs, num_items_in_batch)
        objective = getattr(self, "objective", None)
        if hasattr(objective, "draw"):
            inputs = objective.draw(inputs)
        if Need.FEATURES in self.regularization.needs:
            inputs = {**inputs, "output_hidden_states" if objective is None else "features": True}
        share = 1 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        # Else the trainer divides whatever loss it gets by the accumulated batches.
        counted = self._is_counted(num_items_in_batch)
        losses = self.regularization.losses(
            partial(self._adapted, compute, model, inputs, num_items_in_batch),
            partial(self._outputs, model, inputs),
            batch=inputs,
            items=num_items_in_batch if counted and self._items_are_of_all() else None,
            share=share if counted else 1.0,
            gradient_scale=self._gradient_scale() * (1.0 if counted else share),
        )
        self._note(losses, 1.0 if counted else share)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _adapted(
        self, compute: Any, model: nn.Module, inputs: dict[str, Any], items: Any
    ) -> dict[str, Any]:
        """The trainer's own loss with the outputs it came from."""
        # A copy: trainers take labels out of their inputs.
        loss, outputs = compute(model, dict(inputs), True, items)
        return {**_named(outputs, inputs), "loss": loss}

    def _outputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs without what the trainer does about its loss, for the frozen model."""
        objective = getattr(self, "objective", None)
        if objective is not None:
            return objective(model, **inputs)
        return _named(model(**{k: v for k, v in inputs.items() if k != "labels"}), inputs)

    def _is_counted(self, items: Tensor | int | None) -> bool:
        """Say whether the loss is divided by the items of all accumulated batches already."""
        if items is None:
            return False
        compute_loss_func = getattr(self, "compute_loss_func", None)
        return bool(self.model_accepts_loss_kwargs or compute_loss_func)  # type: ignore[attr-defined]

    def _items_are_of_all(self) -> bool:
        return bool(self.args.average_tokens_across_devices)  # type: ignore[attr-defined]

    def _gradient_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)  # type: ignore[attr-defined]
        return scaler.get_scale() if scaler is not None else 1.0

    # Gradients.

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do the trainer's step; let regularizers change gradients once they are whole."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self.regularization.transform_gradients()
        return loss

    # Logs.

    def _note(self, losses: Mapping[str, Any], share: float) -> None:
        for name, term in {"task_loss": losses["task_loss"], **losses["terms"]}.items():
            value = share * term.detach().float()
            self._terms[name] = self._terms[name] + value if name in self._terms else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the trainer logs, with the means of the terms since they were last logged."""
        if "loss" in logs and self._terms:
            step = self.state.global_step  # type: ignore[attr-defined]
            steps = max(step - self._logged_at, 1)
            for name, total in self._terms.items():
                mean = self.accelerator.gather(total.reshape(1)).mean()  # type: ignore[attr-defined]
                logs[name] = round(mean.item() / steps, 6)
            self._terms, self._logged_at = {}, step
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # State.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        state = self.regularization.state_dict()
        if self.args.should_save and self.regularization.regularizers:  # type: ignore[attr-defined]
            save_state(state, Path(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self._resumed_from = checkpoint

    def _start(self, steps: int, epochs: int) -> None:
        """Start the regularizers, from a checkpoint if the run is resumed from one."""
        self.regularization.start(steps, epochs)
        self._terms, self._logged_at = {}, self.state.global_step  # type: ignore[attr-defined]
        if self._resumed_from is None or not self.regularization.regularizers:
            return
        file = Path(self._resumed_from, STATE_FILE)
        if not file.is_file():
            raise ValueError(
                f"{file.parent} was written without regularizers; resume with `regularizers=[]`, "
                "or start anew"
            )
        self.regularization.load_state_dict(load_state(file))


class _Hooks(TrainerCallback):
    """Tells the regularizers where the run is."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._start(state.max_steps, state.num_train_epochs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.regularization.catch_up(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.regularization.step_end()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.regularization.epoch_end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.regularization.catch_up(int(state.epoch or 0))
        self._trainer.regularization.end()


def _named(outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What an objective would return, of what a transformers model returned."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("features"), Mapping):
        return dict(outputs)
    named = dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs[-1]}
    if named.get("hidden_states"):
        named["features"] = {"hidden": named["hidden_states"][-1]}
    if "mask" not in named and named.get("logits") is not None and "labels" in inputs:
        named["mask"] = _mask(named["logits"], inputs["labels"])
    return named


def _mask(logits: Tensor, labels: Tensor) -> Tensor | None:
    """The positions whose logits are trained: those before a label, in a language model."""
    counts = labels != -100
    if logits.ndim != 3:
        return counts if logits.shape[:-1] == labels.shape else None
    if logits.shape[:2] != labels.shape:
        return None
    return torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
