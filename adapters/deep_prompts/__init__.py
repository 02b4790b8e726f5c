"""Deep prompts: trained tokens in the blocks of a CLIP's towers (arXiv 2307.06948)."""

from ..registration import register
from .config import DeepPromptConfig
from .layer import DeepPromptLayer
from .model import DeepPromptModel

__all__ = ["DeepPromptConfig", "DeepPromptLayer", "DeepPromptModel"]

register("deep_prompt", DeepPromptConfig, DeepPromptModel)
