"""The outputs of a model that tells pictures of classes apart: its own, or new ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from graftune.adapters.base.messages import listing
from graftune.integrations.objectives.image_classes import find_head

logger = logging.getLogger(__name__)


def new_outputs(
    name: str, classes: Sequence[str], known: Sequence[str], count: int, head: str | None
) -> bool:
    """Decide whether a model gets new outputs for the classes of the data.

    Args:
        name: the model's name, for messages.
        classes: the classes of the data.
        known: the classes of the model's outputs by name; empty where they have no names.
        count: the number of its outputs; 0 where it has none.
        head: "keep", "new", or None for new ones where its own are not those of the data.

    Raises:
        ValueError: its own are to be kept, and are not those of the data.
    """
    fits = set(classes) <= set(known) if known else count == len(classes)
    if head == "keep" and not fits:
        missing = [name for name in classes if name not in known]
        why = (
            f"{listing(missing, 3)} not among its {count} classes"
            if known
            else f"{count} outputs without names for {len(classes)} classes"
        )
        raise ValueError(f"the head of {name} cannot be kept: {why}; choose classes, or head: new")
    is_new = head == "new" or not fits
    if not is_new and not known:
        logger.warning(
            "the outputs of %s have no names: the data's classes are taken in alphabetical order, "
            "%s is output 0",
            *(name, classes[0]),
        )
    return is_new


def name_of_head(model: nn.Module) -> str:
    """Return the name of the module that turns a model's pooled features into logits.

    Raises:
        ValueError: there is none that is one module.
    """
    head = find_head(model)
    name = next((name for name, module in model.named_modules() if module is head), None)
    if not name:
        raise ValueError(
            f"{type(model).__name__} has no head that is one module, so it cannot get a new one"
        )
    return name
