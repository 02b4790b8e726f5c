"""The adapter of a run, as its options say."""

from __future__ import annotations

from dataclasses import Field
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from graftune.adapters.base.config import user_fields
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.regularizers import regularizer
from graftune.api import wrap
from graftune.cli.errors import UsageError
from graftune.cli.options import TrainOptions
from graftune.integrations.libraries.base_models import BaseModel
from graftune.integrations.libraries.families import recognise
from graftune.recipe_table import recipes

# Fields of every PEFT config that follow from the command's options.
_FROM_OPTIONS = frozenset({"base_model_name_or_path", "inference_mode", "revision"})


def settable(config_cls: type[PeftConfig]) -> dict[str, Field[Any]]:
    """Return the fields of a config that the command line takes, by name."""
    found = user_fields(config_cls)
    return {name: found[name] for name in found if name not in _FROM_OPTIONS}


def check_method(options: TrainOptions) -> None:
    """Check the method, its fields and the regularizers, before anything is loaded.

    Raises:
        UsageError: an unknown method or field; the nearest is named.
        ValueError: an unknown regularizer or setting.
    """
    classes = [config_class(method) for method in options.methods]
    fields = {name for cls in classes for name in settable(cls)}
    for name in options.adapter_fields:
        if name not in fields:
            raise UsageError(
                f"the adapter of {options.method!r} has no field {name!r}.{nearest(name, fields)} "
                f"Fields: {listing(sorted(fields), most=40)}."
            )
    for given in options.given_regularizers or ():
        regularizer(given)


def config_class(method: str) -> type[PeftConfig]:
    """Return the config class of a recipe, or of a method of PEFT by its name in lower case.

    Raises:
        UsageError: there is neither; the nearest is named.
    """
    if method in recipes():
        return recipes()[method].config_cls
    known = {
        str(peft_type.value).lower(): cls for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if method not in known:
        raise UsageError(
            f"there is no recipe {method!r}.{nearest(method, [*recipes(), *known])} Recipes: "
            f"{listing(recipes())}; methods of PEFT: {listing(sorted(known), most=60)}."
        )
    return known[method]


def adapt(base: BaseModel, options: TrainOptions) -> PeftModel:
    """Attach the adapter of a run to its base model.

    A head that was made anew is trained in full and saved with the adapter.
    """
    fields: dict[str, Any] = dict(options.adapter_fields)
    if options.revision is not None:
        fields["revision"] = options.revision
    if base.new_head is not None:
        others = fields.get("modules_to_save") or []
        fields["modules_to_save"] = [*others, base.new_head]
    return wrap(
        base.model,
        [_method(name, base) for name in options.methods],
        regularizers=options.given_regularizers,
        tokenizer=base.tokenizer,
        **fields,
    )


def _method(name: str, base: BaseModel) -> str | PeftConfig:
    """A recipe by its name, or the config of a method of PEFT."""
    if name in recipes():
        return name
    method = config_class(name)()
    if method.is_prompt_learning and recognise(base.model).task_type is None:
        raise UsageError(
            f"{name!r} puts prompts before the input of a language model, and "
            f"{type(base.model).__name__} is none; choose another recipe"
        )
    return method
