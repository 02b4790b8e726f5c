"""Regularizers at work: what they need is computed once, and their state is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from graftune.adapters.base.frozen import frozen_base
from graftune.adapters.base.messages import listing
from graftune.adapters.base.sharded import is_sharded, keep_spread, whole
from graftune.adapters.regularizers.base import Gradients, Need, Regularizer, Run, State, Step

Forward = Callable[[], Mapping[str, Any]]

_ADDED = ""  # by this name go the gradients of the added terms, which no term can have

# Needs for which gradients are computed by themselves, beside the backward pass of the loss.
APART = frozenset({Need.TERM_GRADIENTS, Need.TASK_GRADIENT})


class Regularization:
    """A list of regularizers in one training run of one model, under any training loop.

    Args:
        model: the adapted model, before it is wrapped for several processes.
        regularizers: in the order in which they act.

    Raises:
        ValueError: two regularizers of one name; each is recorded and resumed by its name.

    Example:
        >>> regularization = Regularization(model, [FrozenDistillation(0.5)])
        >>> regularization.start(steps=100, epochs=2)
        >>> for epoch in range(2):
        ...     for batch in loader:
        ...         outputs = regularization(objective, model, batch)
        ...         accelerator.backward(outputs["loss"])
        ...         regularization.transform_gradients()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         regularization.step_end()
        ...     regularization.epoch_end()
        >>> regularization.end()
    """

    def __init__(self, model: nn.Module, regularizers: Sequence[Regularizer]) -> None:
        names = [regularizer.name for regularizer in regularizers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"more than one regularizer of the name {listing(twice)}")
        self.model = model
        self.regularizers = list(regularizers)
        self.needs = frozenset().union(*(regularizer.needs for regularizer in regularizers))
        self.epochs_done = 0
        self._run = Run(model, steps=0, epochs=0)
        self._apart: dict[str, list[Tensor | None]] = {}  # gradients of terms by themselves

    @property
    def reads_outputs(self) -> bool:
        """Whether any term is of the model's outputs, and not of its weights alone."""
        return any(r.reads_outputs and _has_terms(r) for r in self.regularizers)

    def check(self) -> None:
        """Raise what the regularizers have against the model."""
        for regularizer in self.regularizers:
            regularizer.check(self.model)
            if regularizer.needs & APART and any(
                is_sharded(parameter) for parameter in self._run_parameters().values()
            ):
                raise ValueError(
                    f"{regularizer.name!r} needs gradients of terms by themselves, which sharded "
                    "parameters (FSDP) do not hand out; train with DDP or without it"
                )

    # Along the run.

    def start(self, steps: int, epochs: int) -> None:
        """Start a run of so many optimizer steps and epochs; `load_state_dict` may follow."""
        self.check()
        self._run = Run(self.model, steps, epochs, _seed_of_first_process())
        self.epochs_done = 0
        self._apart = {}
        for parameter in self._run_parameters().values():
            keep_spread(parameter)
        for regularizer in self.regularizers:
            regularizer.start(self._run)

    def step_end(self) -> None:
        """Say that an optimizer step has been made."""
        for regularizer in self.regularizers:
            regularizer.step_end(self._run)

    def epoch_end(self) -> None:
        """Say that an epoch is over."""
        self.epochs_done += 1
        for regularizer in self.regularizers:
            regularizer.epoch_end(self._run, self.epochs_done)

    def catch_up(self, epochs: int) -> None:
        """Say that so many epochs are over, where that is not known yet.

        A run that was resumed from the last step of an epoch has its weights and not its end.
        """
        while self.epochs_done < epochs:
            self.epoch_end()

    def end(self) -> None:
        """Say that training is over: regularizers may put other weights into the adapter."""
        for regularizer in self.regularizers:
            regularizer.end(self._run)

    # Losses.

    def __call__(
        self, objective: Any, model: nn.Module, batch: Mapping[str, Any], **options: Any
    ) -> dict[str, Any]:
        """Return the objective's outputs with the regularizers' terms in the loss.

        Args:
            objective: called as `objective(model, **batch)`; see
                `graftune.integrations.objectives`.
            model: the model as the training loop has it, wrapped or not.
            batch: inputs.
            **options: `items`, `share` and `gradient_scale`, as `losses` takes them.
        """
        batch = objective.draw(batch) if hasattr(objective, "draw") else batch
        keywords = {"features": True} if Need.FEATURES in self.needs else {}
        if options.get("items") is not None:
            keywords["num_items_in_batch"] = options["items"]

        # What of the frozen model never changes, an objective may keep.
        frozen = getattr(objective, "frozen", objective)
        return self.losses(
            partial(objective, model, **batch, **keywords),
            partial(frozen, model, **batch, **keywords),
            batch=batch,
            objective=objective,
            **options,
        )

    def losses(
        self,
        adapted: Forward,
        frozen: Forward | None = None,
        *,
        batch: Mapping[str, Any] | None = None,
        objective: Any = None,
        items: Tensor | int | None = None,
        share: float = 1.0,
        gradient_scale: float = 1.0,
    ) -> dict[str, Any]:
        """Return the outputs of one forward pass with the regularizers' terms in the loss.

        Args:
            adapted: runs the adapted model and returns "loss" and what regularizers need.
            frozen: runs the model on the same batch while its adapter is off; as `adapted` unless
                given. Called only if a regularizer needs it, and once.
            batch: the inputs.
            objective: what `adapted` calls, for regularizers that ask it for more.
            items: by what the task's loss is divided, if not by the number of labels in this batch.
            share: one over the number of accumulated batches, where gradients are added up.
            gradient_scale: by what the loss will be multiplied before the backward pass.

        Returns:
            The adapted model's outputs, with "loss" the sum, "task_loss" the task's, and "terms"
            the added terms by name, as they were added.
        """
        frozen_outputs = None
        if Need.FROZEN in self.needs:
            # First, so that its activations are gone before those of the adapted model are kept.
            with frozen_base(self.model):
                frozen_outputs = (frozen or adapted)()
        outputs = adapted()
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        step = Step(
            self.model, outputs, frozen_outputs, batch or {}, objective, items, processes, share
        )
        given = _joined([regularizer.terms(step) for regularizer in self.regularizers])
        terms = {name: share * term for name, term in given.items()}
        loss = task_loss = outputs["loss"]
        added = sum(terms.values(), start=task_loss.new_zeros(()))
        self._keep_gradients(step, added, gradient_scale)
        if terms:
            loss = task_loss + (added.detach() if Need.TASK_GRADIENT in self.needs else added)
        return {**outputs, "loss": loss, "task_loss": task_loss, "terms": terms}

    # Gradients.

    def _keep_gradients(self, step: Step, added: Tensor, scale: float) -> None:
        """Add up, over accumulated batches, the gradients that are wanted by themselves."""
        wanted: dict[str, Tensor] = {}
        if Need.TERM_GRADIENTS in self.needs:
            terms = _joined([r.separate_terms(step) for r in self.regularizers])
            wanted = {name: step.share * term for name, term in terms.items()}
        if Need.TASK_GRADIENT in self.needs and added.requires_grad:
            wanted[_ADDED] = added
        parameters = list(self._run_parameters().values())
        for name, term in wanted.items():
            new = torch.autograd.grad(
                scale * term, parameters, retain_graph=True, allow_unused=True
            )
            kept = self._apart.get(name)
            self._apart[name] = [
                b if a is None else a if b is None else a + b
                for a, b in zip(kept or [None] * len(new), new, strict=True)
            ]

    def transform_gradients(self, gradient_scale: float = 1.0) -> None:
        """Let regularizers change the gradients of an optimizer step; call it before clipping.

        Args:
            gradient_scale: by what the loss was multiplied for half precision (a gradient scaler's
                scale): regularizers see the gradients without it.
        """
        if not self.regularizers:
            return
        parameters = self._run_parameters()
        for gradients in self._apart.values():
            _average_over_processes(gradients, list(parameters.values()))
        added = self._apart.pop(_ADDED, None)
        given = Gradients(list(parameters), list(parameters.values()), dict(self._apart))
        _multiply(given, 1 / gradient_scale)
        for regularizer in self.regularizers:
            regularizer.transform_gradients(given)
        self._apart = {}
        _multiply(given, gradient_scale)
        if added is not None:
            _add(given.parameters, added)

    def _run_parameters(self) -> dict[str, nn.Parameter]:
        return Run(self.model, 0, 0).trained()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, as `Accelerator.register_for_checkpointing` expects it."""
        states = {regularizer.name: regularizer.state_dict() for regularizer in self.regularizers}
        # Whole tensors: every process calls this, and one may write them.
        states = tree_map_only(torch.Tensor, whole, states)
        return {"epochs_done": self.epochs_done, "regularizers": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a state, after `start`.

        Raises:
            ValueError: it belongs to other regularizers.
        """
        states: Mapping[str, State] = state["regularizers"]
        own = [regularizer.name for regularizer in self.regularizers]
        if list(states) != own:
            raise ValueError(
                f"the checkpoint was written with the regularizers {listing(states) or 'none'}, "
                f"the run has {listing(own) or 'none'}; resume with the same ones, or start anew"
            )
        self.epochs_done = state["epochs_done"]
        for regularizer in self.regularizers:
            regularizer.load_state_dict(states[regularizer.name])


def _has_terms(regularizer: Regularizer) -> bool:
    own = type(regularizer)
    return (own.terms, own.separate_terms) != (Regularizer.terms, Regularizer.separate_terms)


def _joined(of_each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the terms of several regularizers, none of which may hide another."""
    names = [name for terms in of_each for name in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"more than one regularizer has a term of the name {listing(twice)}")
    return {name: term for terms in of_each for name, term in terms.items()}


def _seed_of_first_process() -> int:
    """Torch's seed, the same in all processes."""
    seed = [torch.initial_seed()]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast_object_list(seed)
    return seed[0]


def _average_over_processes(
    gradients: list[Tensor | None], parameters: Sequence[nn.Parameter]
) -> None:
    """Average gradients that were computed by autograd alone, as DDP averages those of the loss."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    there = torch.tensor([g is not None for g in gradients], device=parameters[0].device).int()
    distributed.all_reduce(there, distributed.ReduceOp.MAX)
    for place, anywhere in enumerate(there.tolist()):
        if anywhere:
            # Another process may have used a parameter that this one's batch did not.
            gradient = gradients[place]
            mean = torch.zeros_like(parameters[place]) if gradient is None else gradient
            distributed.all_reduce(mean, distributed.ReduceOp.SUM)
            gradients[place] = mean / distributed.get_world_size()


@torch.no_grad()
def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def _multiply(gradients: Gradients, factor: float) -> None:
    if factor == 1:
        return
    of_task = [parameter.grad for parameter in gradients.parameters]
    for gradient in (g for one in (of_task, *gradients.of_terms.values()) for g in one):
        if gradient is not None:
            gradient.mul_(factor)
