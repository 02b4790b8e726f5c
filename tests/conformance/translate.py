"""Turn rows and objects that PEFT's tests write for a built-in method into ones of our methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from _pytest.mark.structures import ParameterSet

ANY = object()


@dataclass(frozen=True)
class Template:
    """A built-in config class whose rows a method takes over, and what its fields are called there.

    Args:
        config_cls: the built-in config class.
        renamed: its field names to the method's.
        neutral: fields that the method lacks, to the values that mean the same as leaving the
            field out (or ANY).
    """

    config_cls: type[peft.PeftConfig]
    renamed: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One of our methods, as PEFT's tests meet it.

    Args:
        name: starts the ids of its tests.
        config_cls: its config class.
        templates: built-in methods whose rows it takes over, where its config can say the same.
        extra: further rows for lists of PEFT, by the list's argument names without spaces; the
            config class stands for itself and is left out.
        mixed_batches: whether `adapter_names` works in the forward pass.
        always: fields that every config of the method has in the tests.
        treated_as: tests that treat some config classes apart, to the class whose treatment the
            method needs (a learning rate, a tolerance).
    """

    name: str
    config_cls: type[peft.PeftConfig]
    templates: tuple[Template, ...]
    extra: Mapping[str, tuple[tuple[Any, ...], ...]] = field(default_factory=dict)
    mixed_batches: bool = False
    always: Mapping[str, Any] = field(default_factory=dict)
    treated_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def layer_cls(self) -> type:
        """The base class of the method's layers."""
        peft_type = self.config_cls().peft_type
        return peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type].tuner_layer_cls


class NoCounterpartError(ValueError):
    """A row sets a field that the method has nothing like."""


def translated_rows(
    names: list[str], rows: Iterable[Any], ids: Iterable[Any] | None, methods: Iterable[Method]
) -> tuple[list[ParameterSet], list[str], bool]:
    """Return our rows of a list, what had no counterpart, and whether the list concerns us.

    Args:
        names: the list's argument names.
        rows: the rows as `pytest.mark.parametrize` takes them.
        ids: their ids, if they are given apart.
        methods: our methods.
    """
    rows = [ParameterSet.extract_from(row, force_tuple=len(names) == 1) for row in rows]
    labels = list(ids) if ids is not None and not callable(ids) else [row.id for row in rows]
    found, lost, seen = [], [], set()
    concerned = False
    for method in methods:
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            template = _template_of(row.values, method)
            if template is None:
                continue
            concerned = True
            label = label or next((v for v in row.values if isinstance(v, str)), str(index))
            try:
                values = tuple(_translated(value, template, method) for value in row.values)
            except NoCounterpartError as error:
                lost.append(f"{label}: {error}")
                continue
            key = repr((method.name, _without_labels(names, values)))
            if key not in seen:
                seen.add(key)
                name = label if label == str(index) else f"{label}-{index}"
                found.append(ParameterSet(values, row.marks, f"{method.name}-{name}"))
        for index, values in enumerate(method.extra.get(",".join(names), ())):
            if concerned:
                values = _with_class(names, values, method)
                found.append(ParameterSet(values, (), f"{method.name}-{values[0]}-extra{index}"))
    return found, lost, concerned


def translated_kwargs(
    kwargs: Mapping[str, Any], template: Template, method: Method
) -> dict[str, Any]:
    """Return a config's keyword arguments in the method's words.

    Raises:
        NoCounterpartError: the method has nothing like one of them.
    """
    known = {f.name for f in dataclasses.fields(method.config_cls)}
    theirs = {f.name for f in dataclasses.fields(template.config_cls)}
    result = {}
    for name, value in kwargs.items():
        ours = template.renamed.get(name, name)
        if name in template.neutral:
            allowed = template.neutral[name]
            if allowed is not ANY and value not in allowed:
                raise NoCounterpartError(f"{name}={value!r}")
        elif ours == "init_weights" and not isinstance(value, bool):
            raise NoCounterpartError(f"{name}={value!r}")
        elif ours in known:
            result[ours] = value
        elif isinstance(value, dict) and name not in theirs:
            # Configs within a config: one for each part of a pipeline.
            result[name] = translated_kwargs(value, template, method)
        else:
            raise NoCounterpartError(name)
    # And not the keyword arguments of something else.
    is_config = any(name in known or name in template.neutral for name in (*result, *kwargs))
    return {**method.always, **result} if is_config else result


def method_of(values: Iterable[Any], methods: Iterable[Method]) -> Method | None:
    """Return the method that the parameters of a test belong to."""
    for value in values:
        for method in methods:
            if value is method.config_cls or type(value) is method.config_cls or value is method:
                return method
        if isinstance(value, (tuple, list)) and (inner := method_of(value, methods)):
            return inner
    return None


def stand_in(template: Template, method: Method) -> type:
    """Return a class that a test takes for the template's and that makes configs of the method."""

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> peft.PeftConfig:
            if args:
                raise TypeError("only keyword arguments can be put into other words")
            return method.config_cls(**translated_kwargs(kwargs, template, method))

        def __getattr__(cls, name: str) -> Any:
            return getattr(method.config_cls, name)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, method.config_cls)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, method.config_cls)

        def __eq__(cls, other: object) -> bool:
            return other is cls or other is method.config_cls

        def __hash__(cls) -> int:
            return hash(method.config_cls)

    return Meta(template.config_cls.__name__, (), {})


def _template_of(values: Collection[Any], method: Method) -> Template | None:
    for value in values:
        for template in method.templates:
            if value is template.config_cls or type(value) is template.config_cls:
                return template
        if isinstance(value, (tuple, list)) and (inner := _template_of(value, method)):
            return inner
    return None


def _translated(value: Any, template: Template, method: Method) -> Any:
    if value is template.config_cls:
        return method.config_cls
    if type(value) is template.config_cls:
        return method.config_cls(**translated_kwargs(_set_fields(value), template, method))
    if isinstance(value, dict):
        return translated_kwargs(value, template, method)
    if type(value) in (tuple, list):
        return type(value)(_translated(inner, template, method) for inner in value)
    return value


def _set_fields(config: peft.PeftConfig) -> dict[str, Any]:
    """The fields that differ from a config without arguments."""
    plain = type(config)()
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.init and f.name != "peft_type" and getattr(config, f.name) != getattr(plain, f.name)
    }


def _without_labels(names: list[str], values: tuple[Any, ...]) -> list[Any]:
    labels = ("test_name", "tuner_method")
    return [value for name, value in zip(names, values, strict=True) if name not in labels]


def _with_class(names: list[str], values: tuple[Any, ...], method: Method) -> tuple[Any, ...]:
    left = iter(values)
    return tuple(
        method.config_cls if name in ("config_cls", "config_class") else next(left)
        for name in names
    )
