"""Regularizers: loss terms, gradient transforms and weight averages that keep what a model knew.

They work with any PEFT adapter, graftune's or PEFT's own, and own no weights that inference needs.
"""

from .base import Gradients, Need, Regularizer, Run, Step, regularizer
from .frozen_distillation import FrozenDistillation
from .l2_to_start import L2ToStart
from .recording import record, recorded
from .session import Regularization

__all__ = [
    "FrozenDistillation",
    "Gradients",
    "L2ToStart",
    "Need",
    "Regularization",
    "Regularizer",
    "Run",
    "Step",
    "record",
    "recorded",
    "regularizer",
]
