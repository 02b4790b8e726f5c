"""Elastic weight consolidation: weights that earlier tasks needed are held where they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.adapters.base.precision import at_least_float32
from graftune.adapters.base.sharded import check_trained_weights
from graftune.adapters.regularizers.base import Regularizer, Run, State, Step


def diagonal_fisher(
    log_likelihoods: Iterable[Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the mean over images of the squared gradient of each image's log-likelihood.

    The diagonal of the empirical Fisher information, F_i = mean (∂ log p(y | x) / ∂ θ_i)², one
    backward pass an image (arXiv 1612.00796, section 2.1).

    Args:
        log_likelihoods: log p(y | x) of the images of a batch, (B,), batch after batch.
        parameters: θ by name.

    Returns:
        F by name, in the parameters' shapes, in float32 or better.

    Raises:
        ValueError: there are no images.

    Example:
        >>> theta = torch.tensor([2.0], requires_grad=True)
        >>> diagonal_fisher([torch.stack([theta[0], 3 * theta[0]])], {"theta": theta})
        {'theta': tensor([5.])}
    """
    sums = {name: torch.zeros_like(at_least_float32(p)) for name, p in parameters.items()}
    count = 0
    for of_batch in log_likelihoods:
        for of_image in of_batch:
            gradients = torch.autograd.grad(
                of_image, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    sums[name] += at_least_float32(gradient).square()
            count += 1
    if not count:
        raise ValueError("the Fisher information is a mean over images, and there were none")
    return {name: total / count for name, total in sums.items()}


@dataclass
class ElasticWeightConsolidation(Regularizer):
    """Hold weights where earlier tasks left them, by how much these needed them (EWC).

    λ/2 · Σ_i F_i (θ_i − θ*_i)², with θ* the weights after the previous task and F the sum of the
    tasks' `diagonal_fisher` (Overcoming catastrophic forgetting in neural networks, arXiv
    1612.00796, equation 3; with one sum for all tasks as in arXiv 1805.06370). `consolidate` adds a
    task; before the first, the term is not there. Of a classifier that has grown, the rows that
    there were are held.

    Args:
        weight: λ ≥ 0.
        decay: by what the earlier tasks' F is multiplied when one is added, 0 to 1.

    Raises:
        ValueError: a setting is out of range; in training, a weight has another shape.

    Example:
        >>> elastic = ElasticWeightConsolidation(100.0)
        >>> elastic.consolidate(model, objective, batches)  # after a task
    """

    name: ClassVar[str] = "ewc"
    reads_outputs: ClassVar[bool] = False
    weight: float = field(default=1.0, metadata={"help": "λ, the weight of the term."})
    decay: float = field(
        default=1.0, metadata={"help": "What is left of earlier tasks' F when one is added."}
    )

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"`decay` must be from 0 to 1, got {self.decay!r}")
        self._fisher: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        """Raise when the weights are not here."""
        check_trained_weights(model, "ElasticWeightConsolidation measures weights")

    def consolidate(
        self, model: nn.Module, objective: Any, batches: Iterable[Mapping[str, Any]]
    ) -> None:
        """Add a task that has been learned: its F, and the weights as they are now.

        Args:
            model: the adapted model, in evaluation mode for the time of this call.
            objective: called as `objective(model, **batch)`; returns "logits", (B, C).
            batches: of the task's images, with "labels", (B,).
        """
        parameters = Run(model, 0, 0).trained()
        training = model.training
        model.eval()
        new = diagonal_fisher(_log_likelihoods(model, objective, batches), parameters)
        model.train(training)
        for name, of_earlier in self._fisher.items():
            if name in new:
                new[name][tuple(map(slice, of_earlier.shape))] += self.decay * of_earlier
        self._fisher = new
        self._weights = {name: p.detach().clone() for name, p in parameters.items()}

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, without anything of the batch, where a task has been added."""
        if not self._fisher:
            return {}
        now = dict(step.model.named_parameters())
        parts = []
        for name, fisher in self._fisher.items():
            weights = now[name][tuple(map(slice, fisher.shape))]
            if weights.shape != fisher.shape:
                raise ValueError(
                    f"the weight {name!r} has become smaller, {tuple(now[name].shape)} where it "
                    f"was {tuple(fisher.shape)}: start a new ElasticWeightConsolidation"
                )
            fisher, before = fisher.to(weights.device), self._weights[name].to(weights.device)
            parts.append((fisher * (at_least_float32(weights) - before).square()).sum())
        return {self.name: self.weight / 2 * torch.stack(parts).sum()}

    def state_dict(self) -> State:
        """Return what is held, and how firmly."""
        return {"fisher": dict(self._fisher), "weights": dict(self._weights)}

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` returned."""
        self._fisher, self._weights = dict(state["fisher"]), dict(state["weights"])


def _log_likelihoods(
    model: nn.Module, objective: Any, batches: Iterable[Mapping[str, Any]]
) -> Iterable[Tensor]:
    """log p(y | x) of the labelled images of each batch."""
    for batch in batches:
        logits = at_least_float32(objective(model, **batch)["logits"])
        labels = batch["labels"].to(logits.device)
        labelled = labels >= 0  # -100 does not count
        yield -F.cross_entropy(logits[labelled], labels[labelled], reduction="none")
