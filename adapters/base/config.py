"""What the configs of all of graftune's methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig

ConfigT = TypeVar("ConfigT", bound=PeftConfig)

# Called with the folder when an adapter was saved: what else belongs to one, such as a model card
# that imports graftune, is known further up, and entered there.
after_saving: list[Callable[[Path], None]] = []

# Fields that PEFT fills itself, in every config.
_FILLED_BY_PEFT = frozenset({"peft_type", "peft_version", "auto_mapping"})


def user_fields(config_cls: type[PeftConfig]) -> dict[str, Field[Any]]:
    """Return the fields of a config that users set, by name, in their order.

    Fields that PEFT fills are left out, and those that graftune fills, which carry
    `metadata={"internal": True}`.

    Args:
        config_cls: the class of a config of graftune or PEFT.

    Example:
        >>> "fraction" in user_fields(SaraConfig), "cutoff" in user_fields(SaraConfig)
        (True, False)
    """
    return {
        each.name: each
        for each in fields(config_cls)
        if each.init
        and each.name not in _FILLED_BY_PEFT
        and not each.metadata.get("internal", False)
    }


@dataclass
class GraftConfig(PeftConfig):
    """The fields that every method of graftune has beside its own.

    A method's class also says, in `about`, what the method does in one plain sentence that names
    its paper, for model cards.

    Args:
        base_digest: the digest of the base model that the adapter belongs to
            (`graftune.adapters.base.digest.base_digest`); written when an adapter is attached,
            checked when it is loaded. Not meant to be set by hand.
        regularizers: the regularizers that the adapter is trained with, as
            `graftune.adapters.regularizers.record` writes them; the trainer uses them.
    """

    about: ClassVar[str] = ""

    base_digest: str | None = field(
        default=None,
        metadata={
            "help": "Digest of the base model the adapter was trained on; set when it is attached.",
            "internal": True,
        },
    )

    regularizers: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Regularizers the adapter is trained with, each with its name.",
            "internal": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A digest that comes with the constructor was read from a file and waits to be compared;
        # one that was entered on attaching follows the model. Neither of these is a field: they
        # are not saved.
        self.base_digest_is_fresh = False
        self.base_check = "warn"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config, which PEFT does last of all that makes an adapter."""
        super().save_pretrained(save_directory, **kwargs)
        for act in after_saving:
            act(Path(save_directory))


@dataclass
class WeightConfig(GraftConfig):
    """The fields by which methods that change weights choose which, beside those of all methods.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        target_parameters: names of parameters to adapt by themselves.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; with a list of target modules.
        layers_pattern: name of the list of layers that the indices refer to.
        init_weights: True starts as the base model; False elsewhere, for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        TypeError: `target_parameters` is a string.
        ValueError: two fields contradict each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regular expression that matches their full "
            "names, or 'all-linear'. None takes the defaults of the model's architecture."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters to adapt by themselves, for example 'attn.in_proj_weight'."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of modules to leave alone, or a regular expression."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; only with a list of target modules."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the list of layers that layers_to_transform refers to, for example "
            "'layers' or 'h'."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as the base model; False starts elsewhere, for tests."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train in full and to save with the adapter."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        self._check_layer_selection()

    def _check_layer_selection(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str: say it in the "
                        "regular expression, or give a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )


def config_of(config: Any, cls: type[ConfigT]) -> ConfigT | None:
    """Return a config if it is of a class, or its part of that class; None if there is none.

    Example:
        >>> config_of(model.peft_config["default"], MaskTuningConfig).threshold
        0.005
    """
    candidates = getattr(config, "parts", None) or [config]
    return next((each for each in candidates if isinstance(each, cls)), None)
