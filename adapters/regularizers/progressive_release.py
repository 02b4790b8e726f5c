"""Progressive release: what has become important stays as it is, the rest goes on (SaRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.adapters.base.sharded import check_trained_weights, is_sharded
from graftune.adapters.base.sparse_parts import SparsePart, sparse_parts
from graftune.adapters.regularizers.base import Gradients, Regularizer, Run, State


@dataclass
class ProgressiveRelease(Regularizer):
    """Freeze, once in a run, the trained entries that have outgrown their selection.

    SaRA, arXiv 2409.06633, section 4.2: half-way, entries with |v| ≥ t are not small any more; they
    stay at the values they have, and those still below t go on. With select="largest" the entries
    that have shrunk to |v| ≤ t stay; with "random" no entry is outside of its selection, so none
    does. The trained set only shrinks.

    Frozen entries have no gradient, and whatever an optimizer does to them, through momentum or
    weight decay, is undone after its step. All others go on with the optimizer's state as it was.
    (The authors' released code makes a new optimizer at this point and drops the step's gradient.)

    Args:
        at: in (0, 1), the share of the run's steps after which this happens; 0.5 as published.

    Raises:
        ValueError: `at` is out of range; before training, values that are spread over processes.
        TypeError: before training, an adapter that trains no entries of the base model's weights.

    Example:
        >>> model = graftune.wrap(unet, "sara", regularizers=[ProgressiveRelease(0.5)])
    """

    name: ClassVar[str] = "progressive_release"
    at: float = field(
        default=0.5, metadata={"help": "The share of the run's steps after which it happens."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not 0 < self.at < 1:
            raise ValueError(f"`at` must be between 0 and 1, exclusive, got {self.at!r}")
        self._steps = self._last = 0
        self._frozen: dict[str, Tensor] = {}  # booleans, (n,)
        self._kept: dict[str, Tensor] = {}  # the values of frozen entries

    def check(self, model: nn.Module) -> None:
        """Raise when there are no entries to freeze."""
        parts = _trained_parts(model)
        if not parts:
            raise TypeError(
                "ProgressiveRelease needs an adapter that trains entries of the base model's "
                "weights, as SaRA does, and the active one does not; leave it out"
            )
        check_trained_weights(model, "ProgressiveRelease looks at trained values")
        if any(is_sharded(part.values) for part in parts):
            raise ValueError(
                "ProgressiveRelease freezes single entries, which values spread over processes "
                "(FSDP) do not allow; train with DDP"
            )

    def start(self, run: Run) -> None:
        """Count the run's steps anew."""
        self._steps, self._last = 0, math.ceil(self.at * run.steps)
        self._frozen, self._kept = {}, {}
        self._parts = _trained_parts(run.model)

    def transform_gradients(self, gradients: Gradients) -> None:
        """Take the gradient of frozen entries away."""
        for name, parameter in zip(gradients.names, gradients.parameters, strict=True):
            if name in self._frozen and parameter.grad is not None:
                parameter.grad.masked_fill_(self._frozen[name], 0)

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        """Put frozen entries back; freeze those outside of their selection, when it is time."""
        self._steps += 1
        for part in self._parts:
            if part.name in self._frozen:
                part.values.masked_scatter_(self._frozen[part.name], self._kept[part.name])
        if self._steps == self._last:
            self._freeze({part.name: part.outside(part.values) for part in self._parts})

    def _freeze(self, frozen: dict[str, Tensor]) -> None:
        values = {part.name: part.values.detach() for part in self._parts}
        self._frozen = {name: mask for name, mask in frozen.items() if mask.any()}
        self._kept = {name: values[name][mask] for name, mask in self._frozen.items()}

    def state_dict(self) -> State:
        """Return how far the run is, and what is frozen."""
        return {"steps": self._steps, "frozen": dict(self._frozen)}

    def load_state_dict(self, state: State) -> None:
        """Freeze again what was frozen, at the values of the model that was loaded with it."""
        self._steps = state["steps"]
        values = {part.name: part.values for part in self._parts}
        self._freeze({n: mask.to(values[n].device) for n, mask in state["frozen"].items()})


def _trained_parts(model: nn.Module) -> list[SparsePart]:
    return [part for part in sparse_parts(model) if part.values.requires_grad]
