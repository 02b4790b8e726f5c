"""PromptSRC from base to novel classes: train prompts on half of the classes, ask about both.

    accelerate launch examples/clip_promptsrc.py
    python examples/clip_promptsrc.py --data my-pictures
    accelerate launch examples/clip_promptsrc.py --model openai/clip-vit-base-patch16 \
        --data my-pictures --template "a photo of a {}." --depth_text 9 --depth_vision 9

Trains with the paper's settings (arXiv 2307.06948): SGD at 0.0025, the first epoch at 1e-5, cosine
over epochs, Gaussian averaging around three quarters of them. `--data` takes whatever
`graftune.integrations.data.load_images` takes: a folder with one subfolder a class, or a Hub data
set. Without it, the embedded CLIP learns to tell kinds of emoji apart in a style it has never seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

import graftune
from graftune.integrations.data import (
    ImageCollator,
    Selection,
    few_shot,
    load_images,
    select_classes,
    split_classes,
)
from graftune.integrations.protocols import harmonic_mean
from graftune.integrations.schedules import cosine_rates

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "clip"


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What to train on what."""

    model: str = option(str(EMBEDDED), "A CLIP of transformers: Hub id or folder.")
    data: str | None = option(None, "A folder with a subfolder a class, or a Hub data set.")
    template: str = option("a picture of {}", "The text of a class; its words become prompts.")
    shots: int = option(16, "Training pictures a class.")
    depth_text: int = option(3, "Text blocks with prompts.")
    depth_vision: int = option(5, "Vision blocks with prompts.")
    regularize: bool = option(True, "False trains the same prompts without regularizers.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with the paper's defaults."""

    output_dir: str = "outputs/clip_promptsrc"
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    weight_decay: float = 5e-4
    learning_rate: float = 0.0025
    num_train_epochs: float = 20
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 256
    save_strategy: str = "no"
    logging_strategy: str = "epoch"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


def embedded_pictures() -> Dataset:
    """Emoji in the negative of a style of line art, by subcategory."""
    from embedded.pictures import FAR, NEGATIVE, load_style, subcategory_text
    from embedded.task import LEAST_GROUPS, groups_by_class

    style = load_style(FAR + NEGATIVE)
    groups = groups_by_class(style)
    kinds = sorted(kind for kind, found in groups.items() if len(found) >= LEAST_GROUPS)
    rows = [
        (row, label)
        for label, kind in enumerate(kinds)
        for group in groups[kind].values()
        for row in group
    ]
    data = Dataset.from_dict(
        {
            "image": [Image.fromarray(style.images[row]) for row, _ in rows],
            "label": [label for _, label in rows],
            "row": [row for row, _ in rows],
        }
    )
    return data.cast_column("label", ClassLabel(names=[subcategory_text(kind) for kind in kinds]))


def adapt(options: Options, epochs: int, base: Any, processor: Any) -> Any:
    """Attach the prompts; the words before a class's name are what they start as."""
    words = options.template.partition("{}")[0].strip()
    ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    averaging = graftune.GaussianAveraging(mean=0.75 * epochs, std=1)
    return graftune.wrap(
        base,
        "promptsrc",
        tokenizer=processor,
        regularizers=[graftune.SelfRegulation(), averaging] if options.regularize else [],
        init_text=words,
        num_tokens_text=len(ids),
        depth_text=options.depth_text,
        depth_vision=options.depth_vision,
    )


def ask(trainer: graftune.Trainer, parts: dict[str, Dataset], objective: Any) -> dict[str, float]:
    """Return the accuracies in percent on the base and novel classes, and their harmonic mean."""
    found = {}
    for name, data in parts.items():
        trainer.objective = objective.with_class_names(data.features["label"].names)
        found[name] = 100 * trainer.evaluate(data)["eval_accuracy"]
    trainer.objective = objective
    return {**found, "H": harmonic_mean(*found.values())}


def split(data: Dataset, shots: int, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Return a few pictures of each base class, and what to ask about: others and novel ones."""
    base_names, novel_names = split_classes(data.features["label"].names)
    base = select_classes(data, base_names)
    least = int(torch.tensor(base["label"]).bincount().min())
    chosen, rest = few_shot(base["label"], min(shots, least - 1), seed)
    return base.select(chosen), {
        "base": base.select(rest),
        "novel": select_classes(data, novel_names),
    }


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    data = load_images(options.data) if options.data else embedded_pictures()
    train, parts = split(data, options.shots, args.seed)
    processor = AutoProcessor.from_pretrained(options.model)
    epochs = math.ceil(args.num_train_epochs)
    base = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    set_seed(args.seed)  # most of the prompts start at random
    model = adapt(options, epochs, base, processor)
    objective = graftune.ClassNameClassifier(
        train.features["label"].names, processor, options.template
    )
    trainer = graftune.Trainer(
        model,
        args,
        objective=objective,
        train_dataset=train,
        data_collator=ImageCollator(processor),
        epoch_rates=cosine_rates(epochs, args.learning_rate, 1e-5),
    )
    with model.disable_adapter():
        before = ask(trainer, parts, objective)
    trainer.train()
    after = ask(trainer, parts, objective)
    if trainer.is_world_process_zero():
        write(Path(args.output_dir), model, before, after, {"train": train, **parts}, options)
    trainer.end()


def write(
    folder: Path,
    model: Any,
    before: dict[str, float],
    after: dict[str, float],
    parts: dict[str, Dataset],
    options: Options,
) -> None:
    """Save the adapter and the numbers, with the pictures that they were measured on."""
    model.save_pretrained(folder / "adapter")
    source = options.data or "embedded"
    chosen = {
        name: Selection.of(part["row"], source, class_names=part.features["label"].names)
        for name, part in parts.items()
    }
    results = {
        "zero-shot": before,
        "adapted": after,
        "options": dataclasses.asdict(options),
        "pictures": {name: dataclasses.asdict(selection) for name, selection in chosen.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = Table("Accuracy, %", "zero-shot", "adapted")
    for name, value in before.items():
        table.add_row(name, f"{value:.1f}", f"{after[name]:.1f}")
    Console().print(table)
    trained, _ = model.get_nb_trainable_parameters()
    print(f"{trained:,} numbers trained on {chosen['train'].rows} pictures")
    print(f"Written to {folder}: adapter, results.json")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    main()
