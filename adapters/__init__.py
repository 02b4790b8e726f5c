"""What is trained: one folder a method, each registered with PEFT on import."""

from graftune.adapters.flora import FloraConfig
from graftune.adapters.mask_tuning import MaskTuningConfig
from graftune.adapters.prompts.deep import DeepPromptConfig
from graftune.adapters.prompts.one import OnePromptConfig
from graftune.adapters.prompts.pools import CodaPromptConfig, DualPromptConfig, L2PConfig
from graftune.adapters.sara import SaraConfig

__all__ = [
    "CodaPromptConfig",
    "DeepPromptConfig",
    "DualPromptConfig",
    "FloraConfig",
    "L2PConfig",
    "MaskTuningConfig",
    "OnePromptConfig",
    "SaraConfig",
]
