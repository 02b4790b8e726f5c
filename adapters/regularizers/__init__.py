"""Regularizers: loss terms, gradient transforms and weight averages that keep what a model knew.

They work with any PEFT adapter, graftune's or PEFT's own, and own no weights that inference needs.
"""

from .base import Gradients, Need, Regularizer, Run, Step, regularizer
from .frozen_distillation import FrozenDistillation
from .gaussian_averaging import GaussianAveraging, gaussian_weights
from .l2_to_start import L2ToStart
from .recording import record, recorded
from .self_regulation import SelfRegulation, self_regulation_loss
from .session import Regularization

__all__ = [
    "FrozenDistillation",
    "GaussianAveraging",
    "Gradients",
    "L2ToStart",
    "Need",
    "Regularization",
    "Regularizer",
    "Run",
    "SelfRegulation",
    "Step",
    "gaussian_weights",
    "record",
    "recorded",
    "regularizer",
    "self_regulation_loss",
]
