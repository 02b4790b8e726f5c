"""What the trainer does with an objective: the loss, the labels and the metrics are its own."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import EvalPrediction

from graftune.integrations.training.transformers_private import use_one_gpu

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


class ObjectiveTrainer(transformers.Trainer):
    """transformers' trainer with an objective in the place of the model's loss."""

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
            if hasattr(objective, "preprocess_logits_for_metrics"):
                self.preprocess_logits_for_metrics = self._objective_preprocess

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search as transformers does, where the loss is the model's own.

        Raises:
            ValueError: the trainer has an objective.
        """
        if self.objective is not None:
            raise ValueError(
                "transformers' hyperparameter_search keeps its score as `objective`, where this "
                "trainer keeps its own; call optuna around `Trainer(...).train()` instead"
            )
        return super().hyperparameter_search(*args, **kwargs)

    def _keep_to_one_gpu_per_process(self) -> None:
        # nn.DataParallel would scatter the class texts over the GPUs as if they were images.
        if self.args.n_gpu > 1:
            logger.warning(
                "This process sees %d GPUs and uses one; start it with `accelerate launch` or "
                "`torchrun` to use them all.",
                self.args.n_gpu,
            )
            use_one_gpu(self)

    def _objective_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self.objective is not None
        return self.objective.metrics(prediction.predictions, prediction.label_ids)  # type: ignore[operator]

    def _objective_preprocess(self, logits: torch.Tensor, labels: torch.Tensor | None) -> Any:
        assert self.objective is not None
        if labels is None:  # predictions, which no metric is computed of
            return logits
        return self.objective.preprocess_logits_for_metrics(logits, labels)  # type: ignore[operator]

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | int | None:
        """Count what the objective's loss sums over; transformers counts by the model's class."""
        counted = self.model_accepts_loss_kwargs and hasattr(self.objective, "items")
        if not (counted and batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        objective: Any = self.objective
        items = torch.as_tensor(sum(map(objective.items, batch_samples)), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            return self.accelerator.gather(items).sum()
        return items

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
        if not return_outputs:
            return loss
        # In evaluation whatever is beside the loss would be gathered as a prediction.
        kept = outputs if model.training else {"logits": outputs["logits"]}
        return loss, {**kept, "loss": loss}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return loss, logits and labels of a batch, what there is of them."""
        labelled = all(inputs.get(name) is not None for name in self.label_names)
        if self.objective is None or labelled:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.objective(model, **self._prepare_inputs(inputs))
        return outputs.get("loss"), None if prediction_loss_only else outputs["logits"], None
