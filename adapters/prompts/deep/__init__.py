"""Deep prompts: trained tokens in the blocks of a CLIP's towers (arXiv 2307.06948)."""

from graftune.adapters.base.registration import register
from graftune.adapters.prompts.deep.config import DeepPromptConfig
from graftune.adapters.prompts.deep.layer import DeepPromptLayer
from graftune.adapters.prompts.deep.model import DeepPromptModel

__all__ = ["DeepPromptConfig", "DeepPromptLayer", "DeepPromptModel"]

register("deep_prompt", DeepPromptConfig, DeepPromptModel)
