"""The recipes: the papers' methods by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from graftune.adapters.flora import FloraConfig
from graftune.adapters.mask_tuning import MaskTuningConfig
from graftune.adapters.prompts.deep import DeepPromptConfig
from graftune.adapters.prompts.one import OnePromptConfig
from graftune.adapters.prompts.pools import CodaPromptConfig, DualPromptConfig, L2PConfig
from graftune.adapters.regularizers import (
    GaussianAveraging,
    GradientDropout,
    KeyMatching,
    MaskNorm,
    NuclearNorm,
    ProgressiveRelease,
    PromptOrthogonality,
    Regularizer,
    SelfRegulation,
    VirtualOutliers,
)
from graftune.adapters.sara import SaraConfig


@dataclass(frozen=True)
class Recipe:
    """A paper's combination: an adapter config, regularizers and hyperparameters under one name.

    Args:
        name: the name that `graftune.wrap` takes.
        config_cls: the adapter's config class.
        paper: title, venue and identifier of the paper.
        defaults: config fields that the paper sets otherwise than the config class does.
        regularizers: the regularizers that belong to it, with the paper's settings.
    """

    name: str
    config_cls: type[PeftConfig]
    paper: str
    defaults: dict[str, Any] = field(default_factory=dict)
    regularizers: tuple[Regularizer, ...] = ()


_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="flora",
            config_cls=FloraConfig,
            paper="FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739",
        ),
        Recipe(
            name="promptsrc",
            config_cls=DeepPromptConfig,
            paper="Self-regulating Prompts: Foundational Model Adaptation without Forgetting, "
            "ICCV 2023, arXiv 2307.06948",
            regularizers=(SelfRegulation(), GaussianAveraging(mean=15, std=1)),
        ),
        Recipe(
            name="mask_tuning",
            config_cls=MaskTuningConfig,
            paper="Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained "
            "Vision-Language Models, ICCV 2023, arXiv 2307.15049",
            regularizers=(GradientDropout(), MaskNorm()),
        ),
        Recipe(
            name="ovor",
            config_cls=OnePromptConfig,
            paper="OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free "
            "Class-Incremental Learning, ICLR 2024, arXiv 2402.04129",
            regularizers=(VirtualOutliers(),),
        ),
        Recipe(
            name="l2p",
            config_cls=L2PConfig,
            paper="Learning to Prompt for Continual Learning, CVPR 2022, arXiv 2112.08654",
            regularizers=(KeyMatching(0.5),),
        ),
        Recipe(
            name="dual_prompt",
            config_cls=DualPromptConfig,
            paper="DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning, "
            "ECCV 2022, arXiv 2204.04799",
            regularizers=(KeyMatching(),),
        ),
        Recipe(
            name="coda_prompt",
            config_cls=CodaPromptConfig,
            paper="CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free "
            "Continual Learning, CVPR 2023, arXiv 2211.13218",
            regularizers=(PromptOrthogonality(),),
        ),
        Recipe(
            name="sara",
            config_cls=SaraConfig,
            paper="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse "
            "Low-Rank Adaptation, ICLR 2025, arXiv 2409.06633",
            regularizers=(NuclearNorm(5e-4), ProgressiveRelease(0.5)),
        ),
    )
}


def recipes() -> dict[str, Recipe]:
    """Return the recipes by name.

    Example:
        >>> import graftune
        >>> graftune.recipes()["flora"].paper
        'FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739'
    """
    return dict(_RECIPES)
