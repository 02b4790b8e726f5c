"""`graftune eval`: what an adapter changes, measured on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import TrainingArguments

from graftune.cli.data import chosen_classes, pictures, relabelled, short_name, texts
from graftune.cli.errors import UsageError
from graftune.cli.measure import measure, measure_base
from graftune.cli.options import DataOptions, ModelOptions, option
from graftune.cli.parsing import OptionParser
from graftune.cli.published import Published, attach, base_of, find, objective_of
from graftune.cli.report import add_json, metrics_table, quiet, show
from graftune.cli.samples import Samples
from graftune.cli.task import Measurement, picture_collator, row_length
from graftune.integrations.data import Selection, select_classes, text_collator, tokenize_texts
from graftune.integrations.libraries.base_models import BaseModel
from graftune.integrations.objectives import (
    CausalLM,
    ClassNameClassifier,
    Denoising,
    ImageClassifier,
)
from graftune.integrations.sharing import hardware, versions
from graftune.integrations.training import Trainer


@dataclass
class EvalOptions(DataOptions, ModelOptions):
    """What `graftune eval` takes beside the adapter."""

    objective: Literal["class_names", "image_classes", "causal_lm", "denoising"] | None = option(
        None, "What to measure by. None: what the adapter was trained by."
    )
    class_names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other names for the classes of the data, in the order of its labels, and more "
            "names that none of them has. Without: the data's own."
        },
    )
    template: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The text of a class, or several; {} is its name. Without: as in the training."
        },
    )
    batch_size: int = option(32, "Rows at once, in each process.")
    seed: int = option(42, "Decides what is random in measuring a denoiser.")
    use_cpu: bool = option(False, "Compute on the CPU, also where there is a GPU.")

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("there is no data: give --data")


def run(arguments: Sequence[str]) -> None:
    """Measure a base model without and with an adapter."""
    parser = OptionParser("eval", "measure a base model without and with an adapter", [EvalOptions])
    parser.add_argument("adapter", help="the adapter's folder, or its id on the Hub")
    add_json(parser)
    options, given = parser.parse(arguments)
    evaluate(find(given.adapter), options, given.json)


def evaluate(adapter: Published, options: EvalOptions, target: str | None = None) -> None:
    """Measure a base model without and with an adapter, and show the results.

    Args:
        adapter: the adapter.
        options: on what, and how.
        target: where JSON goes; see `report.show`.
    """
    quiet()
    objective = objective_of(adapter, options.objective, options.model, options.revision)
    rows = (texts if objective == "causal_lm" else pictures)(
        options, str(options.data), options.split
    )
    if objective != "causal_lm":
        rows = select_classes(rows, chosen_classes(options.classes, rows.features["label"].names))
    base = base_of(
        adapter, options.model, revision=options.revision, dtype=options.dtype, objective=objective
    )
    model = attach(adapter, base, is_trainable=True)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_eval_batch_size=options.batch_size,
            seed=options.seed,
            use_cpu=options.use_cpu,
            report_to="none",
        )
        measurement, collator = _BUILDERS[objective](adapter, options, base, rows, args.device)
        trainer: Any = Trainer(
            model=model,
            args=args,
            objective=measurement.objective,
            regularizers=[],
            data_collator=collator,
            preprocess_logits_for_metrics=getattr(
                measurement.objective, "preprocess_logits_for_metrics", None
            ),
        )
        before = measure_base(trainer, [measurement])
        after = measure(trainer, [measurement])
    if trainer.is_world_process_zero():
        results = {
            "adapter": adapter.name,
            "model": options.model or adapter.facts.base_model,
            "objective": objective,
            "options": dataclasses.asdict(options),
            "data": dataclasses.asdict(_selection(options, rows)),
            "metrics": {"base": before, "adapted": after},
            "unreadable": getattr(collator, "unreadable", []),
            "versions": versions(),
            "hardware": hardware(),
        }
        show(results, [metrics_table(before, after)], target)
    trainer.end()


def _name(options: EvalOptions) -> str:
    return f"{short_name(str(options.data))}, {options.split}"


def _selection(options: EvalOptions, rows: Any) -> Selection:
    names = rows.features["label"].names if "label" in rows.column_names else ()
    return Selection.of(rows["row"], options.data, options.split, class_names=names)


def _class_names(
    adapter: Published, options: EvalOptions, base: BaseModel, rows: Any, device: Any
) -> tuple[Measurement, Any]:
    names = rows.features["label"].names
    if options.class_names and len(options.class_names) < len(names):
        raise UsageError(
            f"there are {len(options.class_names)} class names and {len(names)} classes in the "
            "data; give one a class, in their order"
        )
    template = options.template or adapter.settings.get("template") or "a photo of a {}."
    objective = ClassNameClassifier(options.class_names or names, base.tokenizer, template)
    return Measurement(_name(options), rows, objective), picture_collator(options, base)


def _image_classes(
    adapter: Published, options: EvalOptions, base: BaseModel, rows: Any, device: Any
) -> tuple[Measurement, Any]:
    rows = relabelled(rows, base.outputs or rows.features["label"].names)
    return Measurement(_name(options), rows, ImageClassifier()), picture_collator(options, base)


def _causal_lm(
    adapter: Published, options: EvalOptions, base: BaseModel, rows: Any, device: Any
) -> tuple[Measurement, Any]:
    settings = adapter.settings
    length = options.max_length or settings.get("max_length") or row_length(options, base)
    pack = options.pack or bool(settings.get("pack"))
    tokens = tokenize_texts(rows, base.tokenizer, length, pack)
    return Measurement(_name(options), tokens, CausalLM()), text_collator(base.tokenizer)


def _denoising(
    adapter: Published, options: EvalOptions, base: BaseModel, rows: Any, device: Any
) -> tuple[Measurement, Any]:
    template = options.template or [adapter.settings.get("template") or "a photo of a {}."]
    samples = Samples(rows, base, template, device)
    return Measurement(_name(options), samples, Denoising(base.parts["scheduler"])), Samples.collate


_BUILDERS = {
    "class_names": _class_names,
    "image_classes": _image_classes,
    "causal_lm": _causal_lm,
    "denoising": _denoising,
}
