"""Low rank for the entries that SaRA trains: the nuclear norm of their matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from graftune.adapters.base.sharded import whole
from graftune.adapters.base.sparse_parts import SparsePart, sparse_parts
from graftune.adapters.regularizers.base import Regularizer, Run, State, Step
from graftune.adapters.regularizers.nuclear import Method, nuclear_norm_and_gradient

LARGER_THAN = 64  # both sides of a matrix, as published


class _NuclearNorm(Function):
    """‖V‖_* of the matrix that has the values at their places and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, part: SparsePart, method: Method) -> Tensor:
        norm, gradient = nuclear_norm_and_gradient(part.dense(values), method=method)
        ctx.save_for_backward(part.entries(gradient).to(values.dtype))
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return grads[0].to(gradient.dtype) * gradient, None, None


@dataclass
class NuclearNorm(Regularizer):
    """Keep the trained entries of a matrix of low rank: λ · ‖W ⊙ mask‖_*.

    SaRA, arXiv 2409.06633, section 4.3. As published, the term is that of one matrix in each
    optimizer step, drawn among all with both sides above 64; convolutions, whose weights have more
    axes, and vectors are left out. Its gradient is that of the trained entries alone.

    Args:
        weight: λ ≥ 0.
        of: "one" matrix a step, drawn by the run's seed, or "all" of them.
        method: how the norm is computed: see `nuclear_norm_and_gradient`.

    Raises:
        ValueError: a setting is out of range.
        TypeError: before training, the adapter trains no entries of such a matrix.

    Example:
        >>> model = graftune.wrap(unet, "sara", regularizers=[NuclearNorm(5e-4)])
    """

    name: ClassVar[str] = "nuclear_norm"
    reads_outputs: ClassVar[bool] = False
    weight: float = field(default=5e-4, metadata={"help": "λ, the weight of the term."})
    of: Literal["one", "all"] = field(
        default="one", metadata={"help": "'one': a random matrix each step; 'all' of them."}
    )
    method: Method = field(
        default="auto",
        metadata={"help": "'svd', 'polar' (matrix products only), or 'auto': by size."},
    )

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")
        if self.of not in ("one", "all"):
            raise ValueError(f"`of` is 'one' or 'all', got {self.of!r}")
        if self.method not in ("auto", "svd", "polar"):
            raise ValueError(f"`method` is 'auto', 'svd' or 'polar', got {self.method!r}")
        self._seed = self._steps = 0

    def check(self, model: nn.Module) -> None:
        """Raise when there is no matrix to keep of low rank."""
        if not _matrices(model):
            raise TypeError(
                f"NuclearNorm needs an adapter that trains entries of matrices with both sides "
                f"above {LARGER_THAN}, and this model has none; leave it out: "
                "regularizers=[graftune.ProgressiveRelease()]"
            )

    def start(self, run: Run) -> None:
        """Note the run's seed."""
        self._seed, self._steps = run.seed, 0

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term of this step's matrix, or of all."""
        parts = _matrices(step.model)
        if self.of == "one":
            parts = [parts[self._draw(len(parts))]]
        norms = [_NuclearNorm.apply(whole(part.values), part, self.method) for part in parts]
        return {self.name: self.weight * torch.stack(norms).sum()}

    def _draw(self, count: int) -> int:
        # The same for all batches of a step and in all processes.
        digest = hashlib.sha256(f"{self._seed} {self._steps}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % count

    def step_end(self, run: Run) -> None:
        """Draw another matrix next."""
        self._steps += 1

    def state_dict(self) -> State:
        """Return what the drawn matrices follow from."""
        return {"seed": self._seed, "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        """Go on with the matrices of a run."""
        self._seed, self._steps = state["seed"], state["steps"]


def _matrices(model: nn.Module) -> list[SparsePart]:
    return [
        part
        for part in sparse_parts(model)
        if len(part.shape) == 2 and min(part.shape) > LARGER_THAN and part.values.requires_grad
    ]
