"""What pretraining runs share: schedule, moving average, and the state they go on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def rate_at(step: int, steps: int, warmup: int = 60, decay: float = 0.35) -> float:
    """The learning rate's factor: up, flat, and down to zero over the last part."""
    left = (steps - step) / (decay * steps)
    return min(1.0, (step + 1) / warmup, max(left, 0.0) + 1e-3)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, step: int, steps: int) -> None:
    """Move averaged weights towards those that are trained, over some `steps` steps."""
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, max(1 / step, 1 / steps))


def use_allowed_cores() -> None:
    """As many threads as there are cores, which on a shared machine may change during a run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and cores != torch.get_num_threads():
        torch.set_num_threads(cores)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a run's state and torch's, so that a crash in between leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    torch.save({**state, "torch": torch.get_rng_state()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def saved_state(folder: Path) -> dict[str, Any] | None:
    """Return the state to go on from, if there is one, and put torch's back."""
    path = folder / "state.pt"
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state.pop("torch"))
    print(f"resumed at step {state['step']}", flush=True)
    return state
