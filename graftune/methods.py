"""From what a user calls methods to configs that suit a model."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn

from graftune.adapters.base.config import user_fields
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.mask_tuning import MaskTuningConfig
from graftune.adapters.prompts.deep import DeepPromptConfig
from graftune.adapters.prompts.prefix import PrefixConfig
from graftune.adapters.regularizers import Regularizer, recorded, regularizer
from graftune.integrations.libraries.attention_places import fill_prefix_config
from graftune.integrations.libraries.families import default_targets, recognise
from graftune.integrations.libraries.masks import fill_mask_config
from graftune.integrations.libraries.prompts import fill_prompt_config
from graftune.recipe_table import recipes

Method = str | PeftConfig

# Fields that are about the model or the whole run, and are set in all methods that have them.
_OF_ALL = frozenset({"modules_to_save", "revision", "task_type"})


def method_configs(methods: Sequence[Method], overrides: Mapping[str, Any]) -> list[PeftConfig]:
    """Return a new config for each method, with overrides set in the one that has such a field.

    Args:
        methods: recipes' names or PEFT configs.
        overrides: values by config field.

    Raises:
        ValueError: an unknown name or field, or a field that several of the methods have.
        TypeError: a method is neither a name nor a config.
    """
    if not methods:
        raise ValueError(f"no method to attach; known: {listing(recipes())}, or any PEFT config")
    found = [_class_and_values(method) for method in methods]
    fields = [user_fields(config_cls) for config_cls, _ in found]
    for name, value in overrides.items():
        owners = [index for index, names in enumerate(fields) if name in names]
        if not owners:
            every = sorted(set().union(*fields))
            classes = " and ".join(config_cls.__name__ for config_cls, _ in found)
            raise ValueError(
                f"{classes} has no field {name!r}.{nearest(name, every)} Fields: "
                f"{listing(every, most=40)}."
            )
        if len(owners) > 1 and name not in _OF_ALL:
            classes = listing(found[index][0].__name__ for index in owners)
            raise ValueError(
                f"{name!r} is a field of {classes}: say whose it is, by giving config objects in "
                "the list of methods"
            )
        for owner in owners:
            found[owner][1][name] = value
    return [config_cls(**values) for config_cls, values in found]


def _class_and_values(method: Method) -> tuple[type[PeftConfig], dict[str, Any]]:
    if isinstance(method, str):
        known = recipes()
        if method not in known:
            raise ValueError(
                f"unknown method {method!r}.{nearest(method, known)} Known: {listing(known)}; any "
                "PEFT config object, such as peft.LoraConfig(), is accepted as well."
            )
        return known[method].config_cls, dict(known[method].defaults)
    if not isinstance(method, PeftConfig):
        raise TypeError(
            f"a method is a recipe's name or a PEFT config, got {type(method).__name__}. Known "
            f"names: {listing(recipes())}."
        )
    given = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    # A config that was attached elsewhere carries that base's digest: this is a new attachment.
    given.pop("base_digest", None)
    return type(method), copy.deepcopy(given)


def own_regularizers(methods: Sequence[Method]) -> list[Regularizer] | None:
    """Return the regularizers that belong to methods: a recipe's, or what a config records.

    None where a single config says nothing about them.

    Raises:
        ValueError: two methods have one and the same regularizer with other settings.
    """
    if len(methods) == 1 and not isinstance(methods[0], str):
        return None
    joined: dict[str, Regularizer] = {}
    for method in methods:
        own = recipes()[method].regularizers if isinstance(method, str) else recorded(method)
        for each in own:
            present = joined.setdefault(each.name, each)
            if present != each:
                raise ValueError(
                    f"two of the methods have the regularizer {each.name!r}, with other settings: "
                    f"{present} and {each}. Say which with `regularizers=[...]`"
                )
    return [regularizer(each) for each in joined.values()]


def fill(config: Any, model: nn.Module, tokenizer: Any) -> None:
    """Fill in what a config leaves open for a model: its task type and the layers to adapt."""
    task_type = recognise(model).task_type
    if config.task_type is None and task_type is not None:
        config.task_type = task_type
    fill_targets(config, model, tokenizer)


@functools.singledispatch
def fill_targets(config: Any, model: nn.Module, tokenizer: Any = None) -> None:
    """Fill in the layers to adapt, by the config's class.

    This serves every method that takes `target_modules`, PEFT's included. Methods that need to
    know more of a model are registered below.

    Raises:
        ValueError: the model has no layers that are adapted by default.
    """
    if getattr(config, "none_targets_all", False):
        return
    if getattr(config, "target_modules", "absent") is not None:
        return
    if getattr(config, "target_parameters", None):
        return
    targets = default_targets(model)
    if not targets:
        family = recognise(model)
        raise ValueError(
            f"the {family.library} model {family.architecture} has no linear, convolution or "
            "attention layers to adapt by default. Name modules with `target_modules` or tensors "
            "with `target_parameters`."
        )
    config.target_modules = set(targets)


fill_targets.register(DeepPromptConfig, fill_prompt_config)
fill_targets.register(PrefixConfig, fill_prefix_config)
fill_targets.register(MaskTuningConfig, fill_mask_config)
