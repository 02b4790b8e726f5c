"""graftune: adapt a pretrained model without making it forget.

A plugin for Hugging Face PEFT. Importing it registers its methods with PEFT, so that
`peft.get_peft_model`, `peft.PeftModel.from_pretrained` and the libraries built on them know them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graftune.adapters import (
    CodaPromptConfig,
    DeepPromptConfig,
    DualPromptConfig,
    FloraConfig,
    L2PConfig,
    MaskTuningConfig,
    OnePromptConfig,
    SaraConfig,
)
from graftune.adapters.base.checkpoint import AdapterMismatchError
from graftune.adapters.base.classifier import grow_classifier, mask_classes
from graftune.adapters.base.tuner import BaseModelMismatchError
from graftune.adapters.prompts.pools import start_task
from graftune.adapters.regularizers import (
    ElasticWeightConsolidation,
    FrozenDistillation,
    GaussianAveraging,
    GradientDropout,
    KeyMatching,
    L2ToStart,
    MaskNorm,
    NuclearNorm,
    PreviousDistillation,
    ProgressiveRelease,
    PromptOrthogonality,
    Regularization,
    Regularizer,
    SelfRegulation,
    VirtualOutliers,
    outlier_loss,
    virtual_outliers,
)
from graftune.adapters.stack import StackConfig
from graftune.api import attached, load, wrap
from graftune.integrations.sharing.class_lists import ClassListError
from graftune.moved import install as _install_moved_paths
from graftune.recipe_table import Recipe, recipes

if TYPE_CHECKING:
    from graftune.integrations.class_incremental import (
        ClassIncrementalTrainer,
        ClassOrder,
        TaskRecord,
        split_tasks,
    )
    from graftune.integrations.objectives import (
        CausalLM,
        ClassNameClassifier,
        Denoising,
        ImageClassifier,
    )
    from graftune.integrations.training import Trainer, TrainerMixin, last_checkpoint

_install_moved_paths()

__version__ = "0.1.0"

__all__ = [
    "AdapterMismatchError",
    "BaseModelMismatchError",
    "CausalLM",
    "ClassIncrementalTrainer",
    "ClassListError",
    "ClassNameClassifier",
    "ClassOrder",
    "CodaPromptConfig",
    "DeepPromptConfig",
    "Denoising",
    "DualPromptConfig",
    "ElasticWeightConsolidation",
    "FloraConfig",
    "FrozenDistillation",
    "GaussianAveraging",
    "GradientDropout",
    "ImageClassifier",
    "KeyMatching",
    "L2PConfig",
    "L2ToStart",
    "MaskNorm",
    "MaskTuningConfig",
    "NuclearNorm",
    "OnePromptConfig",
    "PreviousDistillation",
    "ProgressiveRelease",
    "PromptOrthogonality",
    "Recipe",
    "Regularization",
    "Regularizer",
    "SaraConfig",
    "SelfRegulation",
    "StackConfig",
    "TaskRecord",
    "Trainer",
    "TrainerMixin",
    "VirtualOutliers",
    "attached",
    "grow_classifier",
    "last_checkpoint",
    "load",
    "mask_classes",
    "outlier_loss",
    "recipes",
    "split_tasks",
    "start_task",
    "virtual_outliers",
    "wrap",
]

# Training pulls in much of transformers: only for those who train.
_LAZY = {
    "CausalLM": "graftune.integrations.objectives.causal_lm",
    "ClassIncrementalTrainer": "graftune.integrations.class_incremental",
    "ClassNameClassifier": "graftune.integrations.objectives.class_names",
    "ClassOrder": "graftune.integrations.class_incremental",
    "Denoising": "graftune.integrations.objectives.denoising",
    "ImageClassifier": "graftune.integrations.objectives.image_classes",
    "TaskRecord": "graftune.integrations.class_incremental",
    "Trainer": "graftune.integrations.training",
    "TrainerMixin": "graftune.integrations.training",
    "last_checkpoint": "graftune.integrations.training",
    "split_tasks": "graftune.integrations.class_incremental",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
