"""The options of the commands: dataclasses whose fields say what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from graftune.cli.errors import UsageError
from graftune.cli.yaml_file import parse_value


def option(default: Any, text: str) -> Any:
    """A field with its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    """Which base model."""

    _argument_group_name = "options of graftune"

    model: str | None = option(
        None,
        "The base model: an id on the Hub or a folder (transformers), "
        "open_clip:NAME[/PRETRAINED], timm:NAME, or diffusers:ID[/SUBFOLDER].",
    )
    revision: str | None = option(None, "Branch, tag or commit of the base model on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Type of the base model's weights in memory; auto: that of its file. Adapters are float32.",
    )


@dataclass
class DataOptions:
    """Which data, in which form."""

    data: str | None = option(
        None,
        "A folder with a subfolder of pictures a class; texts as .jsonl, .json or .txt; a data set "
        "on the Hub, or one saved by save_to_disk.",
    )
    split: str = option("train", "Part of the data to use, where it has parts.")
    image_column: str = option("image", "Column with the pictures.")
    label_column: str = option("label", "Column with their classes.")
    text_column: str = option("text", "Column with the texts.")
    classes: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Names of the classes to use, or one of: all, first-half, second-half (of the "
            "names)."
        },
    )
    unreadable: Literal["stop", "skip"] = option(
        "stop",
        "What a picture that cannot be read does: it stops everything, or is named, counted and "
        "left out.",
    )
    max_length: int | None = option(
        None, "Tokens in a row of text. None: 512, or fewer where the model takes fewer."
    )
    pack: bool = option(False, "Put texts one after the other into rows of max_length tokens.")


@dataclass
class TaskOptions:
    """What is learnt."""

    objective: Literal["class_names", "image_classes", "causal_lm", "denoising"] | None = option(
        None, "The loss. None: what the base model was made for."
    )
    template: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={
            "help": "The text of a class, or several; {} is its name. For class_names, and for "
            "denoising by texts."
        },
    )
    head: Literal["new", "keep"] | None = option(
        None,
        "For image_classes: the model's own outputs, or new ones for the classes of the data, "
        "trained in full. None: new ones where its own are not those of the data.",
    )


@dataclass
class TrainOptions(TaskOptions, DataOptions, ModelOptions):
    """What `graftune train` takes beside transformers' training arguments."""

    recipe: list[Any] | str | None = field(
        default="flora",
        metadata={
            "help": "What is trained: a recipe of graftune, a method of PEFT, or a list of them, "
            "such as [promptsrc, mask_tuning], on one model."
        },
    )
    adapter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of the adapter's config, such as {r: 8}. A single one: --adapter.r 8."
        },
    )
    regularizers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "What keeps the model near what it knew: a list such as [{name: "
            "frozen_distillation, weight: 0.5}]. None: the recipe's own; []: none. A single "
            "setting: --regularizers.0.weight 0.1."
        },
    )
    shots: int | None = option(None, "Training pictures a class, drawn by the seed. None: all.")
    first_epoch_rate: float | None = option(
        None,
        "Learning rate of the whole first epoch, such as 1e-5; each later epoch then has its own, "
        "on a cosine that starts at learning_rate. None: lr_scheduler_type, step by step.",
    )
    eval_data: str | None = option(None, "What to measure on. None: a part of the data.")
    eval_split: str | None = option(
        None,
        "Part of eval_data, or of the data if there is no eval_data. None: the split's name, or a "
        "share of the training part.",
    )
    eval_share: float = option(
        0.1,
        "Share of every class that is held out of the training by the seed, where there are "
        "neither eval_data nor eval_split; 0 measures nothing.",
    )
    resume: str | None = option(
        None,
        "A checkpoint to go on from, or auto for the newest whole one in output_dir, if there is "
        "one. None: start anew.",
    )
    push_to: str | None = option(
        None,
        "Repository on the Hub to publish the adapter in after training; hub_token and "
        "hub_private_repo hold for it.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            self.recipe = parse_value(self.recipe)
        self.adapter = _structured("adapter", self.adapter, dict, "a mapping such as {r: 8}")
        example = "a list such as [{name: l2_to_start, weight: 0.1}]"
        self.regularizers = _structured("regularizers", self.regularizers, list, example)
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UsageError(f"there is no {name}: give `{name}` in the file or --{name}")
        if not 0 <= self.eval_share < 1:
            raise UsageError(f"eval_share is {self.eval_share}; it is at least 0 and less than 1")
        if self.first_epoch_rate is not None and not self.first_epoch_rate > 0:
            raise UsageError(f"first_epoch_rate is {self.first_epoch_rate}; it is greater than 0")

    @property
    def methods(self) -> list[str]:
        """The recipes and methods of PEFT that are trained."""
        return [str(each) for each in _listed(self.recipe)]

    @property
    def method(self) -> str:
        """What is trained, in one name."""
        return " + ".join(self.methods)

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """The given fields of the adapter's config."""
        return self.adapter if isinstance(self.adapter, dict) else {}

    @property
    def given_regularizers(self) -> list[Any] | None:
        """The given regularizers; None where the recipe's own are to be taken."""
        return self.regularizers if isinstance(self.regularizers, list) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _structured(name: str, value: Any, kind: type, example: str) -> Any:
    """Return a mapping or list, from the words of YAML if need be."""
    found = parse_value(value) if isinstance(value, str) else value
    if found is not None and not isinstance(found, kind):
        raise UsageError(f"{name} is {found!r}; it is {example}")
    return found
