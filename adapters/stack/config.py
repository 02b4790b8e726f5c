"""The config of several methods on one model: the configs of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from graftune.adapters.base.config import GraftConfig
from graftune.adapters.base.messages import listing
from graftune.adapters.regularizers.recording import FIELD


@dataclass
class StackConfig(GraftConfig):
    """Several methods on one model, each with its own config.

    They are attached in their order: the first sits on the base model's modules, the next around
    it. A mask acts on the pretrained weight whatever the order, and what others add is added to the
    masked one: W' = W ⊙ mask + ΔW. What enters by hooks acts on what all others compute.

    Args:
        parts: configs of two or more methods, each of another one, or what their `to_dict`
            returned. A part whose config has `inference_mode` is frozen, in training too.
        modules_to_save: names of modules that are trained in full and saved; those of the parts
            are among them.

    Raises:
        ValueError: a method that cannot share a model with others, one method twice, or parts that
            train biases of the base model.

    Example:
        >>> StackConfig(parts=[LoraConfig(target_modules=["q_proj"]), FloraConfig(r=4)])
    """

    about = "Several methods on one model."

    parts: list[Any] = field(
        default_factory=list, metadata={"help": "Configs of the methods, in their order."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.STACK  # type: ignore[attr-defined]
        self.parts = [_config(part) for part in self.parts]
        check_parts(self.parts)
        self.share_modules_to_save()

    @property
    def methods(self) -> list[str]:
        """The names of the parts' methods, in lower case."""
        return [method_of(part) for part in self.parts]

    def share_modules_to_save(self) -> None:
        """Let all parts leave alone what any of them trains in full."""
        named = [*(self.modules_to_save or [])]
        for part in self.parts:
            named += [name for name in getattr(part, "modules_to_save", None) or []]
        self.modules_to_save = list(dict.fromkeys(named)) or None
        for part in self.parts:
            if hasattr(part, "modules_to_save"):
                part.modules_to_save = self.modules_to_save and list(self.modules_to_save)

    def to_dict(self) -> dict[str, Any]:
        """Return the config with its parts' as JSON can say them."""
        parts = [_plain(part.to_dict()) for part in self.parts]
        for values in parts:
            values.pop(FIELD, None)  # the stack's own are those of all parts
        return {**super().to_dict(), "parts": parts}


def method_of(config: PeftConfig) -> str:
    """Return the name of a config's method, in lower case."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def tuner_class(config: Any) -> type[BaseTuner]:
    """Return the tuner class of a config's method."""
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def check_parts(parts: Sequence[PeftConfig]) -> None:
    """Raise ValueError for methods that cannot share a model.

    Each has to consist of layers, with no state and no forward pass of its own beside them: only
    then a layer of another method can stand around or inside them.
    """
    names = [method_of(part) for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"the method {listing(twice)} is there more than once; give it one config, for example "
            "with more `target_modules`"
        )
    for name, part in zip(names, parts, strict=True):
        reason = _why_alone(part)
        if reason is not None:
            raise ValueError(
                f"the method {name!r} cannot share a model with others: {reason}. Leave it out, or "
                "merge what was trained by another method into the base model first"
            )


def _why_alone(config: Any) -> str | None:
    if config.is_prompt_learning:
        return "it puts prompts before the input of the whole model"
    cls = tuner_class(config)
    shared = getattr(cls, "uses_shared_state", False)
    if config.is_adaption_prompt or shared or not issubclass(cls, BaseTuner):
        return "it keeps state beside its layers"
    if cls.forward is not BaseTuner.forward:
        return "it has a forward pass of its own"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r} trains biases of the base model in their place"
    return None


def _config(part: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    if isinstance(part, PeftConfig):
        return part
    values = dict(part)
    return PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]].from_peft_type(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
