"""The protocol of regularizers: what they are told, may ask for, and are recorded as."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.adapters.base.messages import listing, nearest

State = dict[str, Any]  # tensors and what JSON can say


class Need(enum.Enum):
    """What a regularizer wants computed; whatever several of them want is computed once."""

    FROZEN = "outputs of the frozen model on the same batch"
    FEATURES = "features of the adapted model, and of the frozen one if that is needed"
    TERM_GRADIENTS = "gradients of own terms, apart from the gradient of the task's loss"
    TASK_GRADIENT = "the gradient of the task's loss, apart from those of the terms added to it"


@dataclass(frozen=True)
class Step:
    """One forward pass, as regularizers see it.

    Args:
        model: the adapted model, without wrappers.
        outputs: what the objective returned ("logits", "loss", "mask", "features").
        frozen: the same of the frozen model, without gradients; only if a regularizer needs it.
        batch: the inputs.
        objective: what computed the outputs, as `graftune.integrations.objectives` says; None for a
            model's own loss.
        items: number of labelled items over all accumulated batches and processes, where the task's
            loss is divided by that.
        processes: number of processes whose gradients are averaged.
        share: the part of an optimizer step that this forward pass is: one over the number of
            accumulated batches, where the gradients of these are added up.
    """

    model: nn.Module
    outputs: Mapping[str, Any]
    frozen: Mapping[str, Any] | None = None
    batch: Mapping[str, Any] = field(default_factory=dict)
    objective: Any = None
    items: Tensor | int | None = None
    processes: int = 1
    share: float = 1.0

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean of values over the positions that count.

        Divided as the task's loss is: gradients over accumulated batches and processes add up to
        that of one large batch, however the items are spread.

        Args:
            values: one for each position, (B, ...).
            mask: booleans of the same shape; None counts all positions.
        """
        if mask is None:
            return values.mean()
        total = torch.where(mask, values, 0).sum()
        if self.items is None:
            return total / mask.sum().clamp(min=1)
        return total / self.items * (self.processes / self.share)


@dataclass(frozen=True)
class Gradients:
    """The gradients of one optimizer step, before clipping; a regularizer may change them in place.

    Those of the loss itself, also where it is scaled for half precision.

    Args:
        names: names of the trained parameters.
        parameters: the parameters; `parameter.grad` is the task's gradient plus that of the added
            terms. If a regularizer needs `Need.TASK_GRADIENT` it is the task's alone for all of
            them, and that of the added terms is added after the last one has changed it.
        of_terms: gradients of the separate terms by term, one for each parameter; None where the
            term does not depend on it.
    """

    names: Sequence[str]
    parameters: Sequence[nn.Parameter]
    of_terms: Mapping[str, Sequence[Tensor | None]]


@dataclass(frozen=True)
class Run:
    """The training run that a regularizer takes part in.

    Args:
        model: the adapted model, without wrappers.
        steps: optimizer steps of the whole run.
        epochs: epochs of the whole run, as a whole number.
        seed: torch's seed when the run started, that of the first process in all of them: random
            numbers that follow from it and the number of the step are the same everywhere.
    """

    model: nn.Module
    steps: int
    epochs: int
    seed: int = 0

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass
class Regularizer:
    """Base of regularizers: loss terms, a gradient transform, and hooks along a run.

    A subclass is a dataclass; its fields are settings that JSON can say. It gives itself a `name`,
    by which configs record it, and overrides what it needs. All of it works with any PEFT adapter.

    Raises:
        ValueError: a subclass has the name of another one.

    Example:
        >>> @dataclass
        ... class OutputNorm(Regularizer):
        ...     name = "output_norm"
        ...     weight: float = 0.01
        ...
        ...     def terms(self, step: Step) -> dict[str, Tensor]:
        ...         return {"norm": self.weight * step.mean(step.outputs["logits"].square())}
    """

    name: ClassVar[str] = ""
    reads_outputs: ClassVar[bool] = True  # False: its terms are of the weights alone

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            _register(cls)

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be computed for it."""
        return frozenset()

    def check(self, model: nn.Module) -> None:
        """Raise when it is not defined for this model; called before training starts."""

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return loss terms by name, weighted, to be added to the task's loss."""
        return {}

    def separate_terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return terms that are never added to the loss: only their gradients are wanted."""
        return {}

    def transform_gradients(self, gradients: Gradients) -> None:
        """Change the gradients of an optimizer step in place, before they are clipped."""

    def start(self, run: Run) -> None:
        """Get ready for a run; when it is resumed, `load_state_dict` follows."""

    def step_end(self, run: Run) -> None:
        """Called after each optimizer step."""

    def epoch_end(self, run: Run, epoch: int) -> None:
        """Called after each epoch; the first is 1."""

    def end(self, run: Run) -> None:
        """Called after the last step, before the adapter is saved."""

    def state_dict(self) -> State:
        """Return what a resumed run needs: tensors and what JSON can say, by name."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` returned."""

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings, as a config records them."""
        return {"name": self.name, **dataclasses.asdict(self)}


_KNOWN: dict[str, type[Regularizer]] = {}


def _register(cls: type[Regularizer]) -> None:
    """Enter a class under its name.

    Module and qualified name identify a class: a reloaded module, a notebook cell that runs again
    and `dataclass(slots=True)` bring a new class of the same identity, which takes over.
    """
    known = _KNOWN.get(cls.name)
    if known is not None and _address(known) != _address(cls):
        raise ValueError(
            f"the regularizer name {cls.name!r} is taken by {_address(known)}; give "
            f"{_address(cls)} another `name`. Taken: {listing(sorted(_KNOWN))}."
        )
    _KNOWN[cls.name] = cls


def _address(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def regularizer(given: Regularizer | Mapping[str, Any]) -> Regularizer:
    """Return a regularizer as it is, or make it from what `to_dict` returned.

    Raises:
        ValueError: an unknown name or setting; the nearest is named.

    Example:
        >>> regularizer({"name": "l2_to_start", "weight": 0.1})
        L2ToStart(weight=0.1, of='adapter')
    """
    if isinstance(given, Regularizer):
        return given
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(
            "a regularizer is an object such as graftune.L2ToStart() or a dict with its 'name' and "
            f"settings, got {given!r}. Names: {listing(sorted(_KNOWN))}."
        )
    settings = dict(given)
    name = settings.pop("name")
    if name not in _KNOWN:
        raise ValueError(
            f"unknown regularizer {name!r}.{nearest(name, _KNOWN)} Known: "
            f"{listing(sorted(_KNOWN))}; import the module that defines one of your own."
        )
    allowed = [f.name for f in dataclasses.fields(_KNOWN[name]) if f.init]
    for setting in settings:
        if setting not in allowed:
            raise ValueError(
                f"the regularizer {name!r} has no setting {setting!r}.{nearest(setting, allowed)} "
                f"Settings: {listing(allowed)}."
            )
    return _KNOWN[name](**settings)
