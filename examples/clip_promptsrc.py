"""PromptSRC from base to novel classes: train prompts on half of the classes, ask about both.

    accelerate launch examples/clip_promptsrc.py
    accelerate launch examples/clip_promptsrc.py --model openai/clip-vit-base-patch16 \
        --data my-pictures --template "a photo of a {}." --depth_text 9 --depth_vision 9

Trains with the paper's settings (arXiv 2307.06948): SGD at 0.0025, the first epoch at 1e-5, cosine
over epochs, Gaussian averaging around three quarters of them. `--data` takes whatever
`graftune.integrations.data.load_images` takes: a folder with one subfolder a class, or a Hub data
set. Without it, the embedded CLIP learns to tell kinds of emoji apart in a style it has never seen.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoProcessor, HfArgumentParser, TrainingArguments

import graftune
from graftune.integrations.data import ImageCollator, load_images
from graftune.integrations.data.sampling import few_shot, select_classes, split_classes
from graftune.integrations.protocols import harmonic_mean
from graftune.integrations.schedules import cosine_rates, epoch_schedule

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
    return {**found, "H": harmonic_mean(*found.values())}


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    data = load_images(options.data) if options.data else embedded_pictures()
    base_names, novel_names = split_classes(data.features["label"].names)
    base_classes = select_classes(data, base_names)
    counts = torch.tensor(base_classes["label"]).bincount()
    chosen, rest = few_shot(
        base_classes["label"], min(options.shots, int(counts.min()) - 1), args.seed
    )
    train = base_classes.select(chosen)
    parts = {"base": base_classes.select(rest), "novel": select_classes(data, novel_names)}

    base = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.model)
    epochs = int(args.num_train_epochs)
    model = adapt(options, epochs, base, processor)
    objective = graftune.ClassNameClassifier(base_names, processor, options.template)
    prompts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(prompts, lr=args.learning_rate, momentum=0.9, weight_decay=5e-4)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule = epoch_schedule(
        optimizer, cosine_rates(epochs, args.learning_rate, 1e-5), -(-len(train) // batch)
    )
    trainer = graftune.Trainer(
        model,
        args,
        objective=objective,
        train_dataset=train,
        data_collator=ImageCollator(processor),
        optimizers=(optimizer, schedule),
    )
    with model.disable_adapter():
        before = ask(trainer, parts, objective)
    trainer.objective = objective
    trainer.train()
    after = ask(trainer, parts, objective)
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(Path(args.output_dir) / "adapter")
    table = Table("Accuracy, %", "zero-shot", "adapted")
    for name, value in before.items():
        table.add_row(name, f"{value:.1f}", f"{after[name]:.1f}")
    Console().print(table)
    print(f"{sum(p.numel() for p in prompts):,} numbers trained on {len(train)} pictures")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    main()
