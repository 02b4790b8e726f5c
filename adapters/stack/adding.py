"""Adding methods to a model that has one already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner

from graftune.adapters.base.restore import untouched_on_error
from graftune.adapters.regularizers import Regularizer, recorded, regularizer
from graftune.adapters.stack.config import check_parts, method_of
from graftune.adapters.stack.model import StackModel


def add_method(
    model: PeftModel,
    configs: Sequence[PeftConfig],
    regularizers: Sequence[Regularizer | Mapping[str, Any]] = (),
) -> None:
    """Add methods to the only adapter of a model, in place.

    What was frozen in that adapter stays frozen, also after saving and loading it for training.

    Args:
        model: a model with one adapter, of one method or several.
        configs: of methods that it does not have yet.
        regularizers: recorded beside those that the adapter has; one of the same name takes the
            place of the one there.

    Raises:
        ValueError: the methods cannot share a model, or there is not one adapter that is not
            merged. The model is then as it was.
    """
    tuner = model.base_model
    present = list(model.peft_config.values())
    if not isinstance(tuner, BaseTuner):
        raise ValueError(
            f"the method {method_of(present[0])!r} cannot share a model with others: it does not "
            "consist of layers in the model"
        )
    stack = tuner if isinstance(tuner, StackModel) else StackModel.around(tuner)
    config = stack.only_config()
    kept = list(config.parts)
    check_parts([*kept, *configs])
    own = {each.name: each for each in [*recorded(present[0]), *map(regularizer, regularizers)]}
    with untouched_on_error(model):
        try:
            stack.add_parts(configs)
        except Exception:
            config.parts = kept
            del stack.tuners[len(kept) :]
            tuner.model.peft_config = tuner.peft_config
            raise
        config.regularizers = [each.to_dict() for each in own.values()] or None
        model.base_model = stack
        model.peft_type = PeftType.STACK  # type: ignore[attr-defined]
