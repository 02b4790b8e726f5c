"""A saved adapter as the commands take it: its files, its record, and its base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

import graftune
from graftune.adapters.base.messages import listing
from graftune.cli.errors import UsageError
from graftune.integrations.libraries.base_models import (
    OBJECTIVES,
    BaseModel,
    default_objective,
    load_base_model,
    locate,
)
from graftune.integrations.libraries.snippet import AUTO_CLASSES
from graftune.integrations.sharing import (
    AdapterFacts,
    TrainingRecord,
    describe,
    fetch_adapter,
    read_record,
)


@dataclass(frozen=True)
class Published:
    """A saved adapter.

    Args:
        name: the folder or id that was given.
        folder: where its files are.
        facts: what its files say.
        record: how it was trained, if that is known.
    """

    name: str
    folder: Path
    facts: AdapterFacts
    record: TrainingRecord | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the objective it was trained by, empty where they are not known."""
        return dict(self.record.objective) if self.record is not None else {}


def find(name: str) -> Published:
    """Find an adapter by its folder, or its id on the Hub.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: it cannot be read.
    """
    folder = fetch_adapter(name, card=True)
    return Published(name, folder, describe(folder), read_record(folder))


def base_of(
    adapter: Published,
    model: str | None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    objective: str | None = None,
) -> BaseModel:
    """Load the base model of an adapter, as it was when the adapter was trained.

    Args:
        adapter: the adapter.
        model: the base model's name; None takes the recorded one.
        revision: its branch, tag or commit; None takes the recorded one.
        dtype: see `load_base_model`.
        objective: what it is loaded for; None takes the recorded one.

    Raises:
        UsageError: no base model was recorded, and none is given.
        OSError, ValueError, ImportError: it cannot be loaded.
    """
    name = model or adapter.facts.base_model
    if not name:
        raise UsageError(f"{adapter.name} does not say its base model; give it with --model")
    if model is None:
        revision = revision or adapter.facts.base_revision
    settings = adapter.settings
    objective = objective or settings.get("name")
    if objective in OBJECTIVES:
        return load_base_model(
            name,
            objective,
            revision=revision,
            dtype=dtype,
            class_names=settings.get("class_names"),
            head=settings.get("head"),
        )
    source = locate(name)
    if source.library != "transformers":
        return load_base_model(name, revision=revision, dtype=dtype)
    kind = adapter.facts.base_class or AUTO_CLASSES.get(str(adapter.facts.task_type))
    if kind is None or not hasattr(transformers, kind):
        return load_base_model(name, revision=revision, dtype=dtype)
    weights = "auto" if dtype == "auto" else getattr(torch, dtype)
    loaded = getattr(transformers, kind).from_pretrained(
        source.name, revision=revision, dtype=weights
    )
    return BaseModel(loaded.eval(), objective="")


def attach(adapter: Published, base: BaseModel, **options: Any) -> PeftModel:
    """Load an adapter onto its base model; see `graftune.load`."""
    return graftune.load(base.model, adapter.folder, **options)


def objective_of(
    adapter: Published, given: str | None, model: str | None, revision: str | None = None
) -> str:
    """Return the name of the objective to measure an adapter by.

    Args:
        adapter: the adapter.
        given: the one that was asked for, if any.
        model: the base model's name; None takes the recorded one.
        revision: its branch, tag or commit; None takes the recorded one.

    Raises:
        UsageError: it is not known.
    """
    found = given or adapter.settings.get("name")
    name = model or adapter.facts.base_model
    if found is None and name:
        if model is None:
            revision = revision or adapter.facts.base_revision
        found = default_objective(name, revision)
    if found not in OBJECTIVES:
        raise UsageError(
            f"{adapter.name} was trained by {found!r}, of which nothing is known; give "
            f"--objective, one of {listing(OBJECTIVES)}"
        )
    return found
