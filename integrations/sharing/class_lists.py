"""The classes of an adapter's classifier: written beside it, held against a base model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from graftune.adapters.base.messages import listing

# Beside an adapter of a sequence of tasks: the classes in their order, and the accuracies.
RECORD = "class_incremental.json"


class ClassListError(ValueError):
    """A classifier's outputs are not the classes that it is asked about."""


def classes_of(folder: Path) -> list[str]:
    """Return the classes of a saved adapter's classifier, in order; empty where they are not known.

    Raises:
        ValueError: their file cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        return []
    try:
        return [str(name) for names in json.loads(file.read_text())["tasks"] for name in names]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(file)!r} is not a record of tasks: {error}") from error


def check_classes(base: nn.Module, folder: Path) -> None:
    """Check that a base model's outputs have no other names than an adapter's classifier.

    Names are those of a config of transformers, of as many outputs as both have; "LABEL_0" and so
    on are none.

    Raises:
        ClassListError: an output has another name.

    Example:
        >>> check_classes(vit, Path("out/task-9"))
    """
    classes = classes_of(folder)
    labels: dict[int, str] = getattr(getattr(base, "config", None), "id2label", None) or {}
    known = [labels[output] for output in sorted(labels)]
    pairs: Any = enumerate(zip(known, classes, strict=False))
    if any(name not in (of_adapter, f"LABEL_{n}") for n, (name, of_adapter) in pairs):
        raise ClassListError(
            f"the base model's outputs are the classes {listing(known)}, and the classifier in "
            f"{str(folder)!r} has {listing(classes)}; load the base model with outputs of its own, "
            f"as for num_labels={len(classes)}"
        )
