"""OnePrompt: one trained prefix a block, the same for all inputs (arXiv 2402.04129)."""

from graftune.adapters.base.registration import register
from graftune.adapters.prompts.one.config import OnePromptConfig
from graftune.adapters.prompts.one.layer import OnePromptLayer
from graftune.adapters.prompts.one.model import OnePromptModel

__all__ = ["OnePromptConfig", "OnePromptLayer", "OnePromptModel"]

register("one_prompt", OnePromptConfig, OnePromptModel)
