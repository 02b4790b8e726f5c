"""How an adapter was trained, kept in the metadata of its model card.

A published adapter is PEFT's folder of three files and no more. So the record is one more key,
`graftune`, in the YAML block with which the card begins: every YAML parser reads it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard

KEY = "graftune"
PACKAGES = ("graftune", "peft", "transformers", "torch", "accelerate")


def versions() -> dict[str, str]:
    """Return the versions that a training run depends on, by package, Python's among them.

    Example:
        >>> sorted(versions())
        ['accelerate', 'graftune', 'peft', 'python', 'torch', 'transformers']
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**packages, "python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """Return what the process runs on: accelerators by name and count, processor, cores."""
    found: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return {**found, "device": "cpu"}
    name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return {**found, "device": name, "devices": torch.accelerator.device_count()}


@dataclass
class TrainingRecord:
    """How an adapter was trained: what it takes to do it again, and what came out.

    Values are brought into plain JSON on construction: tuples and sets become lists, paths and
    enums text, NumPy and torch scalars numbers, keys text.

    Args:
        method: the recipe's or the method's name, for example "flora".
        regularizers: one dict a regularizer, with its name and settings.
        objective: the objective's name and settings.
        task: the task as the Hub calls it ("image-classification", "text-generation", ...), for
            the card's metrics.
        data: source, split, shots, seed, number of rows, digest of the class names and the like.
        hyperparameters: optimizer, learning rate, batch size, schedule, precision and the like.
        seed: the run's seed.
        steps: optimizer steps done.
        epochs: passes over the data done.
        metrics: data set name -> metric name -> value.
        versions: packages and their versions; this process's unless given.
        hardware: what it ran on; this process's machine unless given.
        seconds: wall-clock time of the training.

    Raises:
        TypeError: a value that JSON does not know; names the place.

    Example:
        >>> record = TrainingRecord("flora", seed=0, metrics={"flowers": {"accuracy": 0.93}})
        >>> TrainingRecord.from_dict(record.to_dict()) == record
        True
    """

    method: str
    regularizers: list[dict[str, Any]] = field(default_factory=list)
    objective: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    epochs: float | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    hardware: dict[str, Any] = field(default_factory=hardware)
    seconds: float | None = None

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, _plain(getattr(self, entry.name), entry.name))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON, without what is not known."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value not in (None, [], {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecord:
        """Return the record of a dict; what a later version of graftune wrote beside it is left.

        Raises:
            ValueError: it does not even say the method.
        """
        if "method" not in values:
            raise ValueError(
                f"this is no record of a training: it has no 'method' but {sorted(values)}"
            )
        # What is not recorded is not known: this process's own versions would be made up.
        unknown: dict[str, Any] = {"versions": {}, "hardware": {}}
        known = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{**unknown, **{k: v for k, v in values.items() if k in known}})


def read_record(folder: str | Path) -> TrainingRecord | None:
    """Return the record in an adapter's model card, or None when there is none.

    Args:
        folder: the adapter's folder; of a repository, what `fetch_adapter(..., card=True)` gives.

    Raises:
        ValueError: the card's metadata cannot be read.

    Example:
        >>> record = read_record("outputs/adapter")
        >>> record.seed, record.metrics
        (0, {'flowers': {'accuracy': 0.93}})
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        return None
    values = parse_card(path.read_text(encoding="utf-8"), str(path)).data.get(KEY)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"the key {KEY!r} in the metadata of {str(path)!r} is not a record")
    return TrainingRecord.from_dict(values)


def parse_card(text: str, place: str) -> ModelCard:
    """Return a model card, or raise ValueError when its metadata is no YAML mapping."""
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"the YAML block at the top of {place!r} cannot be read: {' '.join(str(error).split())}"
        ) from error


def _plain(value: Any, place: str) -> Any:
    """Return a value as JSON knows it."""
    if isinstance(value, Enum):
        return _plain(value.value, place)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner, place) for inner in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{place}[{i}]") for i, inner in enumerate(value)]
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), place)
    raise TypeError(
        f"a training record holds numbers, text, lists and dicts; {place} is "
        f"{type(value).__name__}: give its name or its settings instead"
    )
