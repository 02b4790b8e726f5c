"""Gradient dropout: what works against what the frozen model knows is learned less (R-AMT)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftune.adapters.base.precision import at_least_float32
from graftune.adapters.regularizers.base import Gradients, Need, Regularizer, Run, State, Step
from graftune.adapters.regularizers.frozen_distillation import frozen_divergence


def gradient_dropout(
    task_grad: Tensor, frozen_grad: Tensor, uniform: Tensor, weight: float
) -> Tensor:
    """Return g where P > u, and (1 − λ) · g elsewhere.

    P = (1 + sign(g)·(g + k) / (|g| + |k| + 1e-8)) / 2: one where g and k have the same sign, and
    the smaller, the more k outweighs a g of the other sign. Regularized Mask Tuning (arXiv
    2307.15049, section 3.3, gradient dropout regularity).

    Args:
        task_grad: g, the gradient of the task's loss, of any shape.
        frozen_grad: k, the gradient of the divergence from the frozen model, of the same shape.
        uniform: u, random numbers in [0, 1), of the same shape.
        weight: λ, 0 to 1.

    Returns:
        Of the shape and dtype of g; computed in float32 or better.

    Example:
        >>> g, k = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, -0.5, -3.0])
        >>> gradient_dropout(g, k, torch.full((3,), 0.5), weight=0.3)
        tensor([1.0000, 1.0000, 0.7000])
    """
    g, k = at_least_float32(task_grad), at_least_float32(frozen_grad)
    agreement = (1 + g.sign() * (g + k) / (g.abs() + k.abs() + 1e-8)) / 2
    return torch.where(agreement > uniform, task_grad, (1 - weight) * task_grad)


@dataclass
class GradientDropout(Regularizer):
    """Learn less, at random, of what works against the frozen model: `gradient_dropout`.

    g is the gradient of the task's loss, k that of T² · KL(softmax(z₀/T) ‖ softmax(z/T)), the mean
    over the positions of a batch; z₀ are the frozen model's logits. Only g is applied: k decides
    what of it is dropped. The two backward passes share one forward pass, and gradients are those
    of the whole optimizer step: over accumulated batches and processes, without the scale of half
    precision. Weights that the divergence does not depend on keep their gradient.

    The random numbers of a step follow from torch's seed at the start of the run, the number of
    the step, and the order of the trained parameters: they are the same in every process and after
    resuming. It works with any adapter.

    Args:
        weight: λ, 0 to 1; the paper has 0.3 or 1 by data set.
        temperature: T > 0.
        of: what g is the gradient of. "task" (the paper): the task's loss; the gradients of other
            regularizers' terms are added afterwards, undropped. "loss" (the authors' released
            code): the loss with those terms.

    Raises:
        ValueError: a setting is out of range; in training, the objective returns no logits.

    Example:
        >>> model = graftune.wrap(clip, LoraConfig(), regularizers=[GradientDropout(0.3)])
    """

    name: ClassVar[str] = "gradient_dropout"
    weight: float = field(
        default=1.0, metadata={"help": "λ: what is dropped is multiplied by 1 - λ."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "T, by which logits are divided before the softmax."}
    )
    of: Literal["task", "loss"] = field(
        default="task",
        metadata={"help": "'task': other terms are added undropped; 'loss': with other terms."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"`weight` must be from 0 to 1, got {self.weight!r}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be greater than 0, got {self.temperature!r}")
        if self.of not in ("task", "loss"):
            raise ValueError(f"`of` is 'task' or 'loss', got {self.of!r}")
        self._seed = self._steps = 0

    @property
    def needs(self) -> frozenset[Need]:
        """The frozen model's outputs, and gradients of the two terms by themselves."""
        by_itself = {Need.TASK_GRADIENT} if self.of == "task" else set()
        return frozenset({Need.FROZEN, Need.TERM_GRADIENTS} | by_itself)

    def start(self, run: Run) -> None:
        """Note the run's seed."""
        self._seed, self._steps = run.seed, 0

    def separate_terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the divergence from the frozen model."""
        return {self.name: frozen_divergence(step, self.temperature, type(self).__name__)}

    @torch.no_grad()
    def transform_gradients(self, gradients: Gradients) -> None:
        """Drop parts of the gradient."""
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, frozen_grad in zip(
            gradients.parameters, gradients.of_terms[self.name], strict=True
        ):
            grad = parameter.grad
            if grad is None or frozen_grad is None:
                continue
            if grad.device not in generators:
                generators[grad.device] = self._generator(grad.device)
            uniform = torch.rand(grad.shape, generator=generators[grad.device], device=grad.device)
            grad.copy_(gradient_dropout(grad, frozen_grad, uniform, self.weight))
        self._steps += 1

    def _generator(self, device: torch.device) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {self._steps}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))

    def state_dict(self) -> State:
        """Return what the random numbers follow from."""
        return {"seed": self._seed, "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        """Go on with the random numbers of a run."""
        self._seed, self._steps = state["seed"], state["steps"]
