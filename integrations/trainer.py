"""The trainer: transformers' own, with an objective in place of the model's loss."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import EvalPrediction

logger = logging.getLogger(__name__)


def keep_running_statistics(model: nn.Module) -> None:
    """Put the batch normalisations none of whose parameters is trained into evaluation mode.

    In training mode they would replace the pretrained running statistics, which belong to the base
    model and are not saved with an adapter.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def arguments(objective: nn.Module) -> list[str]:
    """Return the names of the arguments that the objective's forward takes."""
    return list(inspect.signature(objective.forward).parameters)


class Trainer(transformers.Trainer):
    """Train an adapter by an objective, under Accelerate.

    This is `transformers.Trainer`: arguments, data sets, callbacks, evaluation, checkpoints and
    resuming are its own, and so is what `accelerate launch` offers. What differs:

    - The loss is the objective's, which calls the model through all its wrappers (DDP, FSDP,
      torch.compile, autocast). Labels are in the column "labels"; columns reach a data collator of
      your own untouched; the objective's metrics are reported unless `compute_metrics` is given.
    - Batch normalisations whose parameters are frozen stay in evaluation mode, so that the base
      model's running statistics stay what they were. Dropout of the base model is active in
      training, as with transformers.
    - A loss that is not finite ends the training in one error; checkpoints stay as they are.
    - Training arguments are saved as training_args.json instead of a pickle.

    Args:
        *args: those of `transformers.Trainer`; `model` is what `graftune.wrap` returned.
        objective: a module without weights, called as `objective(model, **inputs)` with the
            collated batch, which returns a dict with "logits" and, given "labels", "loss". If it
            takes `num_items_in_batch`, it gets the number of labels in the accumulated batches of
            all processes and divides its summed loss by that. None: the model's own loss.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: nothing in the model is trainable, or the objective has trainable weights.
        FloatingPointError: when training, the loss is not finite; names the step.

    Example:
        >>> model = graftune.wrap(clip, "flora")
        >>> objective = graftune.ClassNameClassifier(class_names, processor)
        >>> trainer = graftune.Trainer(model, TrainingArguments("out"), objective=objective,
        ...                            train_dataset=data, data_collator=ImageCollator(processor))
        >>> trainer.train()
        >>> model.save_pretrained("my-adapter")
    """

    objective: nn.Module | None

    def __init__(self, *args: Any, objective: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_collator = kwargs.get("data_collator", args[2] if len(args) > 2 else None)
        self.objective = objective
        trained: nn.Module = self.model  # type: ignore[assignment]
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise ValueError(
                "no parameter of the model is trainable; give what graftune.wrap or "
                "peft.get_peft_model returned, or load the adapter with is_trainable=True"
            )
        self._keep_to_one_gpu_per_process()
        if objective is not None:
            self._take_objective(objective)

    def _take_objective(self, objective: nn.Module) -> None:
        if any(parameter.requires_grad for parameter in objective.parameters()):
            raise ValueError(
                f"{type(objective).__name__} has trainable weights, which would be neither trained "
                "nor saved; put them into the model, or freeze them"
            )
        objective.to(self.args.device)
        # transformers guesses these three from the model's forward, which the objective replaces.
        self.model_accepts_loss_kwargs = "num_items_in_batch" in arguments(objective)
        self.label_names = self.args.label_names or ["labels"]
        if self.compute_metrics is None and hasattr(objective, "metrics"):
            self.compute_metrics = self._objective_metrics

    def _keep_to_one_gpu_per_process(self) -> None:
        # nn.DataParallel would scatter the class texts over the GPUs as if they were images.
        if self.args.n_gpu > 1:
            logger.warning(
                "This process sees %d GPUs and uses one; start it with `accelerate launch` or "
                "`torchrun` to use them all.",
                self.args.n_gpu,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size

    def _objective_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self.objective is not None
        return self.objective.metrics(prediction.predictions, prediction.label_ids)  # type: ignore[operator]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.objective is not None:
            columns: Any = [*(self._signature_columns or []), *arguments(self.objective)]
            self._signature_columns = columns

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self._own_collator is not None:
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        if self._own_collator is not None:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the objective's loss and, if asked, its logits."""
        if model.training:
            keep_running_statistics(model)
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counted = (
            model.training and self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
        if counted:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = self.objective(model, **inputs)
        loss = outputs["loss"]
        if counted and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, but this loss is already divided by the labels
            # of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": outputs["logits"]}) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Do transformers' training step, and stop when its loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(loss, inputs))
        return loss

    def _not_finite(self, loss: torch.Tensor, inputs: dict[str, Any]) -> str:
        bad = [
            name
            for name, value in inputs.items()
            if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all()
        ]
        advice = (
            f"the batch's {' and '.join(bad)} is not finite, look at the data"
            if bad
            else f"lower learning_rate (now {self._get_learning_rate():.3g}) or warm it up"
        )
        return (
            f"the loss is {loss.item()} at step {self.state.global_step + 1} of "
            f"{self.state.max_steps}, epoch {self.state.epoch or 0:.2f}: {advice}; the last "
            f"checkpoint in {self.args.output_dir} is unharmed"
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return loss, logits and labels of a batch; without labels the logits alone."""
        labelled = all(inputs.get(name) is not None for name in self.label_names)
        if self.objective is None or labelled:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self.objective(model, **self._prepare_inputs(inputs))["logits"]
        return None, None if prediction_loss_only else logits.detach(), None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if self.args.should_save and (folder / "training_args.bin").exists():
            (folder / "training_args.bin").unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string())
