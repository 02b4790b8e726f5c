"""Self-regulation: prompted features and logits stay near the frozen model's (PromptSRC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.adapters.base.feature_cache import FeatureCache, frozen_state
from graftune.adapters.base.frozen import frozen_base
from graftune.adapters.base.precision import at_least_float32
from graftune.adapters.regularizers.base import Need, Regularizer, Step
from graftune.adapters.regularizers.templates import GENERAL_TEMPLATES


def self_regulation_terms(
    logits: Tensor,
    frozen_logits: Tensor,
    text: Tensor,
    frozen_text: Tensor,
    image: Tensor,
    frozen_image: Tensor,
    *,
    text_weight: float,
    image_weight: float,
    logits_weight: float,
) -> dict[str, Tensor]:
    """Return the three terms whose sum is `self_regulation_loss`, by name."""
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(frozen_logits, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True) / logits.numel()
    return {
        "text": text_weight * (text - frozen_text).abs().mean(),
        "image": image_weight * (image - frozen_image).abs().mean(),
        "logits": logits_weight * divergence,
    }


def self_regulation_loss(
    logits: Tensor,
    frozen_logits: Tensor,
    text: Tensor,
    frozen_text: Tensor,
    image: Tensor,
    frozen_image: Tensor,
    *,
    text_weight: float = 25.0,
    image_weight: float = 10.0,
    logits_weight: float = 1.0,
) -> Tensor:
    """Return λ_t·mean|t − t₀| + λ_v·mean|v − v₀| + λ_z·KL(softmax z₀ ‖ softmax z) / (B·C).

    Self-regulating Prompts (arXiv 2307.06948, equations 3 to 5); the divergence is divided by the
    number of logits, as the authors' weights expect. The means are over all elements.

    Args:
        logits: z of the adapted model, scale applied, (B, C).
        frozen_logits: z₀ of the frozen model, (B, C).
        text: t, text features of length one, (C, D).
        frozen_text: t₀, of length one, (C, D).
        image: v, image features of length one, (B, D).
        frozen_image: v₀, of length one, (B, D).
        text_weight: λ_t ≥ 0.
        image_weight: λ_v ≥ 0.
        logits_weight: λ_z ≥ 0.

    Example:
        >>> z, t, v = torch.zeros(2, 3), torch.eye(3), torch.eye(2, 3)
        >>> self_regulation_loss(z, z, t, t, v, v)
        tensor(0.)
    """
    return sum(
        self_regulation_terms(
            logits,
            frozen_logits,
            text,
            frozen_text,
            image,
            frozen_image,
            text_weight=text_weight,
            image_weight=image_weight,
            logits_weight=logits_weight,
        ).values(),
        start=logits.new_zeros(()),
    )


@dataclass
class SelfRegulation(Regularizer):
    """Keep a CLIP's features and logits near the frozen model's: `self_regulation_loss`.

    The frozen image features and logits are those of the adapted model with its adapter off. The
    frozen text features are the mean over many templates (textual diversity, arXiv 2307.06948,
    section 3.3), scaled to length one; they are computed once for a list of classes. It works with
    any adapter of a CLIP, and with an objective that encodes class names.

    Args:
        text_weight: λ_t ≥ 0, of the text features.
        image_weight: λ_v ≥ 0, of the image features.
        logits_weight: λ_z ≥ 0, of the logits.
        templates: texts with `{}` for the class name; None takes a general list of 60.

    Raises:
        ValueError: a weight is negative or a template has no `{}`.
        TypeError: in training, the objective does not encode class names.

    Example:
        >>> model = graftune.wrap(clip, "flora", regularizers=[SelfRegulation(image_weight=5)])
    """

    name: ClassVar[str] = "self_regulation"
    text_weight: float = field(default=25.0, metadata={"help": "Weight of the text features."})
    image_weight: float = field(default=10.0, metadata={"help": "Weight of the image features."})
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the logits."})
    templates: list[str] | None = field(
        default=None, metadata={"help": "Texts with {} for the name; None: a general list of 60."}
    )

    def __post_init__(self) -> None:
        for name in ("text_weight", "image_weight", "logits_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)!r}")
        for text in self.templates or ():
            if text.count("{}") != 1:
                raise ValueError(
                    f"template {text!r} needs exactly one {{}} for the class name, as in 'a photo "
                    "of a {}.'"
                )
        self._frozen_text = FeatureCache()

    @property
    def needs(self) -> frozenset[Need]:
        """Features of both models on the same pictures."""
        return frozenset({Need.FROZEN, Need.FEATURES})

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the three terms, each under its own name."""
        assert step.frozen is not None
        objective = _encoder_of_names(step.objective)
        features, frozen_image = step.outputs["features"], step.frozen["features"]["image"]
        with torch.no_grad():
            frozen_text = self._text_of(step.model, objective).to(frozen_image)
            frozen_logits = objective.logits(step.model, frozen_image, frozen_text)
        compared = (
            step.outputs["logits"],
            frozen_logits,
            objective.class_means(features["text"]),
            frozen_text,
            features["image"],
            frozen_image,
        )
        terms = self_regulation_terms(
            *map(at_least_float32, compared),
            text_weight=self.text_weight,
            image_weight=self.image_weight,
            logits_weight=self.logits_weight,
        )
        return {f"self_regulation_{name}": term for name, term in terms.items()}

    def _text_of(self, model: nn.Module, objective: Any) -> Tensor:
        """The frozen text features of the objective's classes, (C, D), kept until these change."""
        template = tuple(self.templates or GENERAL_TEMPLATES)

        def compute() -> Tensor:
            with frozen_base(model):
                features: Tensor = objective.class_features(
                    model, template=template, of_length_one=False
                )
            return features

        state = (tuple(objective.class_names), template, frozen_state(model))
        return self._frozen_text.get(model, state, compute)


def _encoder_of_names(objective: Any) -> Any:
    if not hasattr(objective, "class_features"):
        raise TypeError(
            "SelfRegulation compares features of class names, and the objective "
            f"{type(objective).__name__} has none; use graftune.ClassNameClassifier, or "
            "FrozenDistillation for other objectives"
        )
    return objective
