"""Pools of prompts, from which each image gets its own by what the frozen model says of it."""

from ..registration import register
from .coda_prompt import CodaPromptLayer, CodaPromptModel
from .config import CodaPromptConfig, DualPromptConfig, L2PConfig, PoolConfig
from .dual_prompt import DualPromptLayer, DualPromptModel
from .l2p import L2PLayer, L2PModel
from .layer import PoolLayer
from .tasks import start_task

__all__ = [
    "CodaPromptConfig",
    "CodaPromptLayer",
    "CodaPromptModel",
    "DualPromptConfig",
    "DualPromptLayer",
    "DualPromptModel",
    "L2PConfig",
    "L2PLayer",
    "L2PModel",
    "PoolConfig",
    "PoolLayer",
    "start_task",
]

register("l2p", L2PConfig, L2PModel)
register("dual_prompt", DualPromptConfig, DualPromptModel)
register("coda_prompt", CodaPromptConfig, CodaPromptModel)
