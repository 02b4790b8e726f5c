"""OnePrompt: one trained prefix a block, the same for all inputs (arXiv 2402.04129)."""

from ..registration import register
from .config import OnePromptConfig
from .layer import OnePromptLayer
from .model import OnePromptModel

__all__ = ["OnePromptConfig", "OnePromptLayer", "OnePromptModel"]

register("one_prompt", OnePromptConfig, OnePromptModel)
