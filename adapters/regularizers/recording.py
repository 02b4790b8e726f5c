"""Regularizers in an adapter's config, whoever's config it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig

from graftune.adapters.regularizers.base import Regularizer, regularizer

FIELD = "regularizers"


def record(
    config: PeftConfig, regularizers: Sequence[Regularizer | Mapping[str, Any]]
) -> PeftConfig:
    """Return the config with its regularizers recorded: they are saved with it.

    graftune's configs have a field for them. One of PEFT's becomes an instance of a subclass of its
    class with that field: everything else about it stays, and PEFT without graftune reads the saved
    file, with one warning about the field that it leaves out.

    Args:
        config: any PEFT config; it is not changed.
        regularizers: objects, or what their `to_dict` returned.

    Raises:
        ValueError: an unknown regularizer or setting.
    """
    return note(config, [regularizer(given).to_dict() for given in regularizers])


def note(config: PeftConfig, values: list[dict[str, Any]]) -> PeftConfig:
    """Return the config with names and settings noted as they are, known here or not.

    An adapter is loaded for inference where the class of a regularizer is not at hand.
    """
    noted = copy.deepcopy(config) if has_field(config) else _with_field(config)
    setattr(noted, FIELD, values or None)
    return noted


def recorded(config: PeftConfig) -> list[Regularizer]:
    """Return the regularizers that a config records, none if it records none."""
    return [regularizer(values) for values in getattr(config, FIELD, None) or ()]


def has_field(config: PeftConfig) -> bool:
    """Say whether a config's class has a field for regularizers."""
    return any(f.name == FIELD for f in dataclasses.fields(config))


def _with_field(config: PeftConfig) -> PeftConfig:
    instance = object.__new__(_recording(type(config)))
    instance.__dict__.update(copy.deepcopy(config.__dict__))
    return instance


_CLASSES: dict[type[PeftConfig], type[PeftConfig]] = {}


def _recording(config_cls: type[PeftConfig]) -> type[PeftConfig]:
    """Return the subclass of a config class with a field for regularizers."""
    if config_cls not in _CLASSES:
        _CLASSES[config_cls] = _made(config_cls)
    return _CLASSES[config_cls]


def _made(config_cls: type[PeftConfig]) -> type[PeftConfig]:
    return dataclasses.make_dataclass(
        f"Recording{config_cls.__name__}",
        [(FIELD, "list[dict] | None", dataclasses.field(default=None))],
        bases=(config_cls,),
        # The class is made anew in each process: an instance is pickled as its base and its values.
        namespace={"__reduce__": _reduce, "__module__": __name__},
    )


def _reduce(self: PeftConfig) -> tuple[Any, ...]:
    base = type(self).__mro__[1]
    return _rebuild, (base, self.__dict__)


def _rebuild(config_cls: type[PeftConfig], values: dict[str, Any]) -> PeftConfig:
    instance = object.__new__(_recording(config_cls))
    instance.__dict__.update(values)
    return instance
