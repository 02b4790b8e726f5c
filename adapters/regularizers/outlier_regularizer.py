"""Virtual outliers as a regularizer: a task's classes leave room for the tasks to come (OVOR)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftune.adapters.base.messages import warn_once
from graftune.adapters.regularizers.base import Regularizer, Run, State, Step
from graftune.adapters.regularizers.outliers import (
    check_settings,
    too_high,
    too_low,
    virtual_outliers,
)

Head = Callable[[Tensor], Tensor]


@dataclass
class VirtualOutliers(Regularizer):
    """Tighten the classifier around the classes of a task: `outlier_loss` on `virtual_outliers`.

    λ · [mean h(max(0, E_in − m_in)) + mean h(max(0, m_out − E_out))] over the images of a batch and
    over the outliers (OVOR, arXiv 2402.04129, section 3.2). Outliers are drawn once, by `prepare`,
    from the features of a task's images; before that, and after `clear`, the term is not there. So
    it acts in a phase of its own, after a task's normal epochs and with whatever is trained in it,
    the classifier alone in the paper. Any adapter and any head that maps features to logits will
    do.

    Args:
        weight: λ ≥ 0.
        inside_energy: m_in, at which an image's energy is low enough.
        outside_energy: m_out, at which an outlier's energy is high enough.
        neighbours, select, samples, sigma, per_class: as `virtual_outliers` takes them.
        outlier_center: "boundary" (the paper) or "origin" (the authors' released code).

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> outliers = VirtualOutliers()
        >>> outliers.prepare(features, labels, head=model.get_base_model().classifier)
        >>> regularization = Regularization(model, [outliers])
    """

    name: ClassVar[str] = "virtual_outliers"
    weight: float = field(default=0.1, metadata={"help": "λ, the weight of the term."})
    inside_energy: float = field(
        default=-15.0, metadata={"help": "Energy that images should not exceed."}
    )
    outside_energy: float = field(
        default=-3.0, metadata={"help": "Energy that outliers should reach."}
    )
    neighbours: int = field(default=50, metadata={"help": "K, of the K-th neighbour."})
    select: int = field(default=50, metadata={"help": "Boundary features of a class."})
    samples: int = field(default=600, metadata={"help": "Candidates around each of them."})
    sigma: float = field(default=0.1, metadata={"help": "Standard deviation of the noise."})
    per_class: int = field(default=40, metadata={"help": "Outliers that are kept of a class."})
    outlier_center: Literal["boundary", "origin"] = field(
        default="boundary", metadata={"help": "'boundary': the paper; 'origin': as released."}
    )

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")
        if self.outlier_center not in ("boundary", "origin"):
            raise ValueError(
                f"`outlier_center` is 'boundary' or 'origin', got {self.outlier_center!r}"
            )
        check_settings(
            self.neighbours,
            self.select,
            self.samples,
            self.sigma,
            self.per_class,
            self.outlier_center,
        )
        self._outliers: Tensor | None = None
        self._classes: list[int] = []
        self._head: Head | None = None

    def prepare(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        head: Head,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw outliers around the classes of a task; the term is there from now on.

        Args:
            features: what enters the head, of the task's images, (M, D).
            labels: their classes, (M,): those of the current task and of no other.
            head: maps features to the logits that the objective returns, a column a class.
            generator: the draws; the same one gives the same outliers.

        Raises:
            ValueError: features and labels do not belong together.
        """
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"there are {tuple(labels.shape)} labels for features of the shape "
                f"{tuple(features.shape)}; give one label for each row of features"
            )
        self._classes = sorted(set(labels.tolist()))
        of_classes = [
            virtual_outliers(
                features[labels == label],
                neighbours=self.neighbours,
                select=self.select,
                samples=self.samples,
                sigma=self.sigma,
                per_class=self.per_class,
                center=self.outlier_center,
                generator=generator,
            )
            for label in self._classes
        ]
        self._outliers = torch.cat(of_classes)  # (classes · per_class, D)
        self._head = head

    def clear(self) -> None:
        """Forget the outliers: the term is not there until the next `prepare`."""
        self._outliers, self._classes, self._head = None, [], None

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, where outliers have been drawn."""
        if self._outliers is None:
            return {}
        logits = step.outputs.get("logits")
        if logits is None or self._head is None:
            missing = "the objective's logits" if logits is None else "`prepare` with the head"
            raise ValueError(f"VirtualOutliers needs {missing} to compare images and outliers")
        outliers = self._outliers.to(logits.device)
        outside = self._head(outliers.to(_dtype_of(self._head, outliers)))
        inside = too_high(logits[:, self._classes], self.inside_energy)  # (B,)
        beyond = too_low(outside[:, self._classes], self.outside_energy)  # (classes · per_class,)
        return {self.name: self.weight * (step.mean(inside, _mask(step)) + beyond.mean())}

    def end(self, run: Run) -> None:
        """Say so when there was no term in the run."""
        if self._outliers is None:
            warn_once(
                "virtual outliers: not prepared",
                "VirtualOutliers had no part in this run: outliers are drawn by its method "
                "`prepare`, from the features of a task's images, before the phase that uses them",
            )

    def state_dict(self) -> State:
        """Return the outliers and their classes; the head comes with `prepare`."""
        if self._outliers is None:
            return {}
        return {"outliers": self._outliers, "classes": self._classes}

    def load_state_dict(self, state: State) -> None:
        """Take the outliers of an interrupted phase in the place of those of `prepare`."""
        if state:
            self._outliers, self._classes = state["outliers"], list(state["classes"])


def _mask(step: Step) -> Tensor | None:
    mask = step.outputs.get("mask")
    return None if mask is None or mask.ndim != 1 else mask


def _dtype_of(head: Head, outliers: Tensor) -> torch.dtype:
    """The dtype of a head's weights, where it has any."""
    weights = head.parameters() if isinstance(head, torch.nn.Module) else ()
    return next((weight.dtype for weight in weights), outliers.dtype)
