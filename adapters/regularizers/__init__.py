"""Regularizers: loss terms, gradient transforms and weight averages that keep what a model knew.

They work with any PEFT adapter, graftune's or PEFT's own, and own no weights that inference needs.
"""

from graftune.adapters.regularizers.base import Gradients, Need, Regularizer, Run, Step, regularizer
from graftune.adapters.regularizers.ewc import ElasticWeightConsolidation, diagonal_fisher
from graftune.adapters.regularizers.frozen_distillation import FrozenDistillation
from graftune.adapters.regularizers.gaussian_averaging import GaussianAveraging, gaussian_weights
from graftune.adapters.regularizers.gradient_dropout import GradientDropout, gradient_dropout
from graftune.adapters.regularizers.l2_to_start import L2ToStart
from graftune.adapters.regularizers.mask_norm import MaskNorm, mask_norm
from graftune.adapters.regularizers.nuclear import nuclear_norm_and_gradient
from graftune.adapters.regularizers.nuclear_norm import NuclearNorm
from graftune.adapters.regularizers.outlier_regularizer import VirtualOutliers
from graftune.adapters.regularizers.outliers import outlier_loss, virtual_outliers
from graftune.adapters.regularizers.previous_distillation import PreviousDistillation
from graftune.adapters.regularizers.progressive_release import ProgressiveRelease
from graftune.adapters.regularizers.prompt_pool import KeyMatching, PromptOrthogonality
from graftune.adapters.regularizers.recording import record, recorded
from graftune.adapters.regularizers.self_regulation import SelfRegulation, self_regulation_loss
from graftune.adapters.regularizers.session import Regularization

__all__ = [
    "ElasticWeightConsolidation",
    "FrozenDistillation",
    "GaussianAveraging",
    "GradientDropout",
    "Gradients",
    "KeyMatching",
    "L2ToStart",
    "MaskNorm",
    "Need",
    "NuclearNorm",
    "PreviousDistillation",
    "ProgressiveRelease",
    "PromptOrthogonality",
    "Regularization",
    "Regularizer",
    "Run",
    "SelfRegulation",
    "Step",
    "VirtualOutliers",
    "diagonal_fisher",
    "gaussian_weights",
    "gradient_dropout",
    "mask_norm",
    "nuclear_norm_and_gradient",
    "outlier_loss",
    "record",
    "recorded",
    "regularizer",
    "self_regulation_loss",
    "virtual_outliers",
]
