"""What the trainer does with regularizers: their terms, gradients, hooks and state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from graftune.adapters.regularizers import Need, Regularization, Regularizer, recorded, regularizer
from graftune.adapters.regularizers.state_file import load_state, save_state, state_digest
from graftune.integrations.training.base import SomeTrainer
from graftune.integrations.training.limits import check_limits
from graftune.integrations.training.outputs import named, seen_outputs

STATE_FILE = "regularizers.safetensors"


def regularizers_of(model: nn.Module) -> list[Regularizer]:
    """Return the regularizers that the config of a model's active adapter records.

    Example:
        >>> regularizers_of(graftune.wrap(model, "flora", regularizers=[L2ToStart()]))
        [L2ToStart(weight=0.001, of='adapter')]
    """
    return recorded(model.active_peft_config) if isinstance(model, PeftModel) else []


class RegularizedTrainer(SomeTrainer):
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
        model: Any = self.model
        if regularizers is None:
            chosen = regularizers_of(model)
        else:
            chosen = [regularizer(given) for given in regularizers]
        check_limits(chosen, self)
        self.regularization = Regularization(model, chosen)
        self.regularization.check()
        self._terms: dict[str, Tensor] = {}  # sums since they were logged
        self._logged_at = 0
        self._resumed_from: str | None = None
        self.add_callback(_Hooks(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does."""
        self._resumed_from = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # Losses.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss and, in training, the regularizers' terms added to it."""
        compute = super().compute_loss
        if not (model.training and self.regularization.regularizers):
            return compute(model, inputs, return_outputs, num_items_in_batch)
        inputs = self._with_what_is_needed(inputs)
        share = 1 / self.current_gradient_accumulation_steps
        # Else the trainer divides whatever loss it gets by the accumulated batches.
        counted = self._is_counted(num_items_in_batch)
        losses = self.regularization.losses(
            partial(self._adapted, compute, model, inputs, num_items_in_batch),
            partial(self._outputs, model, inputs),
            batch=inputs,
            objective=self._objective,
            items=self._items_of_all(num_items_in_batch) if counted else None,
            share=share if counted else 1.0,
            gradient_scale=self._gradient_scale() * (1.0 if counted else share),
        )
        self._note(losses, 1.0 if counted else share)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    @property
    def _objective(self) -> Any:
        """The objective, or None where the loss is the model's or the trainer's own."""
        return getattr(self, "objective", None)

    def _with_what_is_needed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if hasattr(self._objective, "draw"):
            inputs = self._objective.draw(inputs)
        if Need.FEATURES not in self.regularization.needs:
            return inputs
        return {**inputs, "features" if self._objective else "output_hidden_states": True}

    def _adapted(
        self, compute: Any, model: nn.Module, inputs: dict[str, Any], items: Any
    ) -> dict[str, Any]:
        """The trainer's own loss with the outputs it came from."""
        # Copies: trainers take labels out of their inputs.
        if not self.regularization.reads_outputs:
            return {"loss": compute(model, dict(inputs), False, items)}
        if self._objective is not None:
            loss, outputs = compute(model, dict(inputs), True, items)
            return {**outputs, "loss": loss}
        with seen_outputs(model) as seen:
            loss = compute(model, dict(inputs), False, items)
        return {**self._named(seen.outputs, inputs), "loss": loss}

    def _outputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs without what the trainer does about its loss, for the frozen model."""
        if self._objective is not None:
            return getattr(self._objective, "frozen", self._objective)(model, **inputs)
        without = {name: value for name, value in inputs.items() if name != "labels"}
        return self._named(model(**without), inputs)

    def _named(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return named(outputs, inputs, shifted=getattr(self, "_loss_shifts_labels", False))

    def _is_counted(self, items: Tensor | int | None) -> bool:
        """Say whether the loss is divided by the items of all accumulated batches already."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        own_function = getattr(self, "compute_loss_func", None) is not None
        return own_function or bool(self.model_accepts_loss_kwargs and items is not None)

    def _items_of_all(self, items: Tensor | int | None) -> Tensor | int | None:
        """The items over all processes, or as many as if all had as many as this one."""
        if items is None or self.args.average_tokens_across_devices:
            return items
        return items * self.args.world_size

    def _gradient_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0

    # Gradients.

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do the trainer's step; let regularizers change gradients once they are whole."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.regularization.transform_gradients(self._gradient_scale())
        return loss

    # Logs.

    def _note(self, losses: Mapping[str, Any], share: float) -> None:
        for name, term in {"task_loss": losses["task_loss"], **losses["terms"]}.items():
            value = share * term.detach().float()
            self._terms[name] = self._terms[name] + value if name in self._terms else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the trainer logs, with the means of the terms since they were last logged."""
        if "loss" in logs and self._terms:
            step = self.state.global_step
            steps = max(step - self._logged_at, 1)
            for name, total in self._terms.items():
                mean = self.accelerator.gather(total.reshape(1)).mean()
                logs[name] = round(mean.item() / steps, 6)
            self._terms, self._logged_at = {}, step
        super().log(logs, *args, **kwargs)

    # State.

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random numbers' state and the regularizers': both may differ by process."""
        super()._save_rng_state(output_dir)
        if not self.regularization.regularizers:
            return
        state = self.regularization.state_dict()
        digest = state_digest(state)
        if self.args.should_save:
            save_state(state, Path(output_dir, STATE_FILE))
        if digest != gather_object([digest])[0]:
            save_state(state, Path(output_dir, self._own_state_file()))

    def _own_state_file(self) -> str:
        return f"{Path(STATE_FILE).stem}_{self.args.process_index}.safetensors"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _start(self, steps: int, epochs: int) -> None:
        """Start the regularizers, from a checkpoint if the run is resumed from one."""
        # `model_init` makes another model for each run.
        self.regularization.model = self.accelerator.unwrap_model(
            self.model, keep_torch_compile=False
        )
        self.regularization.start(steps, epochs)
        self._terms, self._logged_at = {}, self.state.global_step
        if self._resumed_from is None or not self.regularization.regularizers:
            return
        folder = Path(self._resumed_from)
        files = [folder / name for name in (self._own_state_file(), STATE_FILE)]
        found = [file for file in files if file.is_file()]
        if not found:
            raise ValueError(
                f"{folder} was written without regularizers or with save_only_model=True; resume "
                "with `regularizers=[]`, or start anew"
            )
        self.regularization.load_state_dict(load_state(found[0]))


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
        # Not once more after resuming from a checkpoint of an epoch's end.
        self._trainer.regularization.catch_up(math.ceil(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.regularization.catch_up(int(state.epoch or 0))
        self._trainer.regularization.end()
