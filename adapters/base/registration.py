"""Entering a third-party method into PEFT: a member of `PeftType` and the method's mappings.

`PeftType` is a closed string enum, PEFT offers no entry points, and `register_peft_method` refuses
names that are not members. A private enum or a bare string in PEFT's tables would break everybody
who calls `PeftType(name)` or reads `.value`; so a real member is added, the way `EnumType` itself
builds one, and everything after that is PEFT's own registration.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `peft.PeftType`, adding it when it is missing.

    Args:
        name: upper-case name of the method, for example `"FLORA"`.

    Raises:
        RuntimeError: the running Python builds enums in a way this function does not know.

    Example:
        >>> add_peft_type("FLORA") is PeftType("FLORA")
        True
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType.__setattr__ refuses to reassign members and knows nothing of ours yet.
    type.__setattr__(PeftType, name, member)
    # Python 3.13 looks values up in a list as well.
    getattr(PeftType, "_hashable_values_", []).append(name)

    known = (
        PeftType(name) is member,
        PeftType[name] is member,
        getattr(PeftType, name) is member,
        member in list(PeftType),
        member.value == member.name == name,
    )
    if not all(known):
        raise RuntimeError(
            f"adding {name} to peft.PeftType did not take on this Python version; please report it"
        )
    return member


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a method under `name` with PEFT; registering the same classes twice does nothing.

    Args:
        name: lower-case name of the method; tensors carry the prefix `name + "_"`.
        config_cls: its `PeftConfig` subclass.
        model_cls: its `BaseTuner` subclass, whose `prefix` is `name + "_"`.

    Raises:
        ImportError: another package has taken the name, and which one.
    """
    peft_type = add_peft_type(name.upper())
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if owner is not None:
        if _identity(owner) != _identity(config_cls):
            raise ImportError(
                f"the PEFT method name {name!r} is taken by {owner.__module__}."
                f"{owner.__qualname__}; graftune cannot register {config_cls.__qualname__} beside "
                "it. Import only one of the two packages in one process."
            )
        # A reloaded module brings new classes of the same name: the newest serve from here on.
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        return
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
