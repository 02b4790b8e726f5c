"""Pools of prompts, from which each image gets its own by what the frozen model says of it."""

from graftune.adapters.base.registration import register
from graftune.adapters.prompts.pools.coda_prompt import CodaPromptLayer, CodaPromptModel
from graftune.adapters.prompts.pools.config import (
    CodaPromptConfig,
    DualPromptConfig,
    L2PConfig,
    PoolConfig,
)
from graftune.adapters.prompts.pools.dual_prompt import DualPromptLayer, DualPromptModel
from graftune.adapters.prompts.pools.l2p import L2PLayer, L2PModel
from graftune.adapters.prompts.pools.layer import PoolLayer
from graftune.adapters.prompts.pools.tasks import start_task

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
