"""Going on to the next task."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftune.adapters.prompts.pools.config import TaskPoolConfig
from graftune.adapters.prompts.pools.layer import PoolLayer


def start_task(model: nn.Module, task: int, adapter_name: str | None = None) -> None:
    """Tell a pool which task comes now: its prompts are trained, and what is known counts them in.

    Adapters without tasks stay as they are, so that a loop over tasks can call it for any.

    Args:
        model: a `peft.PeftModel`.
        task: its number; the first is 0.
        adapter_name: None takes the active adapter.

    Raises:
        ValueError: more tasks than the pool was made for.

    Example:
        >>> model = graftune.wrap(vit, "coda_prompt", tasks=10)
        >>> for task, images in enumerate(tasks):
        ...     start_task(model, task)
    """
    peft_model: Any = model
    name = adapter_name or peft_model.active_adapter
    config = peft_model.peft_config[name]
    configs = [c for c in getattr(config, "parts", [config]) if isinstance(c, TaskPoolConfig)]
    for each in configs:
        each.check_task(task)
    for each in configs:
        each.task = task
    for module in model.modules():
        if isinstance(module, PoolLayer) and name in module.tasks:
            module.tasks[name] = task
