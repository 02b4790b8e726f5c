"""Regularizers: loss terms, gradient transforms and weight averages that keep what a model knew.

They work with any PEFT adapter, graftune's or PEFT's own, and own no weights that inference needs.
"""

from .base import Gradients, Need, Regularizer, Run, Step, regularizer
from .ewc import ElasticWeightConsolidation, diagonal_fisher
from .frozen_distillation import FrozenDistillation
from .gaussian_averaging import GaussianAveraging, gaussian_weights
from .gradient_dropout import GradientDropout, gradient_dropout
from .l2_to_start import L2ToStart
from .mask_norm import MaskNorm, mask_norm
from .nuclear import nuclear_norm_and_gradient
from .nuclear_norm import NuclearNorm
from .outlier_regularizer import VirtualOutliers
from .outliers import outlier_loss, virtual_outliers
from .previous_distillation import PreviousDistillation
from .progressive_release import ProgressiveRelease
from .prompt_pool import KeyMatching, PromptOrthogonality
from .recording import record, recorded
from .self_regulation import SelfRegulation, self_regulation_loss
from .session import Regularization

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
