"""What is trained: one folder a method, each registered with PEFT on import."""

from graftune.adapters.deep_prompts import DeepPromptConfig
from graftune.adapters.flora import FloraConfig

__all__ = ["DeepPromptConfig", "FloraConfig"]
