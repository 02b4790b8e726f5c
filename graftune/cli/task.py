"""What a run learns and is measured by: base model, objective and data put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graftune.cli.data import Parts, parts_of_pictures, parts_of_texts, relabelled, short_name
from graftune.cli.errors import UsageError
from graftune.cli.options import DataOptions, TrainOptions
from graftune.cli.samples import Samples
from graftune.integrations.data import (
    ImageCollator,
    Selection,
    hold_out,
    text_collator,
    tokenize_texts,
)
from graftune.integrations.libraries.base_models import BaseModel, load_base_model
from graftune.integrations.objectives import (
    CausalLM,
    ClassNameClassifier,
    Denoising,
    ImageClassifier,
)

MAX_LENGTH = 512  # tokens in a row of text, where nothing is said
# What the Hub calls the tasks.
HUB_TASKS = {
    "class_names": "zero-shot-image-classification",
    "image_classes": "image-classification",
    "causal_lm": "text-generation",
    "denoising": "unconditional-image-generation",
}


@dataclass(frozen=True)
class Measurement:
    """Something to measure a model on.

    Args:
        name: what it is called in tables.
        data: the rows.
        objective: by which it is measured.
    """

    name: str
    data: Any
    objective: nn.Module


@dataclass(frozen=True)
class Task:
    """What is learnt from what.

    Args:
        base: the base model.
        objective: the loss of the training.
        collator: rows to a batch.
        train: the rows that are trained on.
        measurements: what is measured before and after; the first while training too.
        settings: the objective's name and settings, to be recorded.
        selections: which rows were chosen, to be recorded.
    """

    base: BaseModel
    objective: nn.Module
    collator: Callable[..., Any]
    train: Any
    measurements: list[Measurement]
    settings: dict[str, Any]
    selections: dict[str, Selection] = field(default_factory=dict)


def build_task(options: TrainOptions, args: Any, objective: str) -> Task:
    """Load the data and the base model, and put them together.

    Args:
        options: the run's.
        args: transformers' training arguments.
        objective: the objective's name.

    Raises:
        OSError, ValueError, ImportError: data or model are not there, or do not fit.
    """
    if args.label_smoothing_factor and objective != "image_classes":
        raise UsageError(f"label_smoothing_factor is for image_classes, not for {objective}")
    # One process fills the caches of data sets that come from the Hub, the others read them.
    with args.main_process_first(desc="loading the data"):
        if objective == "causal_lm":
            parts = parts_of_texts(options, args.seed)
        else:
            parts = parts_of_pictures(options, args.seed, objective == "class_names")
    return _BUILDERS[objective](options, args, parts)


def base_model(options: TrainOptions, objective: str, parts: Parts) -> BaseModel:
    """Load the base model of a run."""
    assert options.model is not None  # checked by the options
    return load_base_model(
        options.model,
        objective,
        revision=options.revision,
        dtype=options.dtype,
        class_names=parts.class_names if objective == "image_classes" else None,
        head=options.head,
    )


def _class_names(options: TrainOptions, args: Any, parts: Parts) -> Task:
    base = base_model(options, "class_names", parts)
    objective = ClassNameClassifier(parts.class_names, base.tokenizer, options.template)
    measurements = []
    for name, data in parts.measured.items():
        names = parts.other_names if name in parts.of_others else parts.class_names
        measurements.append(Measurement(name, data, objective.with_class_names(names)))
    settings = {"name": "class_names", "template": options.template}
    return Task(
        base,
        objective,
        picture_collator(options, base),
        parts.train,
        measurements,
        {**settings, "class_names": parts.class_names},
        parts.selections,
    )


def _image_classes(options: TrainOptions, args: Any, parts: Parts) -> Task:
    base = base_model(options, "image_classes", parts)
    objective = ImageClassifier(label_smoothing=args.label_smoothing_factor)
    measurements = [
        Measurement(name, relabelled(data, base.outputs), objective)
        for name, data in parts.measured.items()
    ]
    settings = {"name": "image_classes", "head": "new" if base.new_head else "keep"}
    return Task(
        base,
        objective,
        picture_collator(options, base),
        relabelled(parts.train, base.outputs),
        measurements,
        {**settings, "class_names": list(base.outputs)},
        parts.selections,
    )


def _causal_lm(options: TrainOptions, args: Any, parts: Parts) -> Task:
    base = base_model(options, "causal_lm", parts)
    objective = CausalLM()
    length = row_length(options, base)
    train = tokenize_texts(parts.train, base.tokenizer, length, options.pack)
    measured = {
        name: tokenize_texts(data, base.tokenizer, length, options.pack)
        for name, data in parts.measured.items()
    }
    selections = parts.selections
    if not selections:  # one text: what is held out are rows of its tokens
        name = short_name(str(options.data))
        train = train.add_column("row", list(range(len(train))))
        train, held_out = hold_out(train, options.eval_share, args.seed)
        measured = {f"{name}, held out": held_out}
        selections = {
            part: Selection.of(rows["row"], f"{options.data} (rows of tokens)", seed=args.seed)
            for part, rows in {"train": train, **measured}.items()
        }
        train = train.remove_columns("row")
        measured = {part: rows.remove_columns("row") for part, rows in measured.items()}
    measurements = [Measurement(name, data, objective) for name, data in measured.items()]
    settings = {"name": "causal_lm", "max_length": length, "pack": options.pack}
    collator = text_collator(base.tokenizer)
    return Task(base, objective, collator, train, measurements, settings, selections)


def _denoising(options: TrainOptions, args: Any, parts: Parts) -> Task:
    if options.unreadable == "skip":
        raise UsageError("unreadable: skip is for classification; a denoiser takes all pictures")
    base = base_model(options, "denoising", parts)
    objective = Denoising(base.parts["scheduler"])

    def samples(data: Any) -> Samples:
        return Samples(data, base, options.template, args.device)

    measurements = [Measurement(n, samples(data), objective) for n, data in parts.measured.items()]
    train = samples(parts.train)
    settings = {"name": "denoising", **train.settings}
    return Task(base, objective, Samples.collate, train, measurements, settings, parts.selections)


_BUILDERS: Mapping[str, Callable[[TrainOptions, Any, Parts], Task]] = {
    "class_names": _class_names,
    "image_classes": _image_classes,
    "causal_lm": _causal_lm,
    "denoising": _denoising,
}


def picture_collator(options: DataOptions, base: BaseModel) -> ImageCollator:
    """Return what makes batches of pictures for a model."""
    assert base.transform is not None
    return ImageCollator(base.transform, unreadable=options.unreadable)


def row_length(options: DataOptions, base: BaseModel) -> int:
    """Return how many tokens a row of text has at most."""
    if options.max_length is not None:
        return options.max_length
    positions = getattr(base.model.config, "max_position_embeddings", None) or MAX_LENGTH
    return min(MAX_LENGTH, base.tokenizer.model_max_length, positions)
