"""Measuring a model on data sets, by the objectives that belong to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graftune.adapters.base.frozen import frozen_base
from graftune.cli.curves import is_speed
from graftune.cli.task import Measurement

Metrics = dict[str, dict[str, float]]


def measure(trainer: Any, measurements: Iterable[Measurement]) -> Metrics:
    """Return metrics by data set.

    Whatever is random in an objective is the same at every call, and the run's own random numbers
    stay as they are.

    Args:
        trainer: a `graftune.Trainer`; its objective stays as it is.
        measurements: the data sets.
    """
    objective = trainer.objective
    found: Metrics = {}
    device = trainer.args.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, measurement in enumerate(measurements):
            torch.manual_seed(trainer.args.seed)
            # The first is measured while training too: its metrics are one curve.
            prefix = "eval" if number == 0 else f"other{number}"
            trainer.objective = measurement.objective
            try:
                metrics = trainer.evaluate(measurement.data, metric_key_prefix=prefix)
            finally:
                trainer.objective = objective
            found[measurement.name] = {
                name.removeprefix(f"{prefix}_"): value
                for name, value in metrics.items()
                if name.startswith(f"{prefix}_") and not is_speed(name)
            }
    return found


def measure_base(trainer: Any, measurements: Iterable[Measurement]) -> Metrics:
    """Return the same of the base model: the adapter is switched off."""
    with frozen_base(trainer.model):
        return measure(trainer, measurements)
