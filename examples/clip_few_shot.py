"""Few-shot adaptation of a CLIP: what it gains on classes it is shown, and what it keeps.

    accelerate launch examples/clip_few_shot.py
    python examples/clip_few_shot.py --model openai/clip-vit-base-patch16 --data my-pictures

Trains an adapter on a few pictures of each of some classes, drawn in a style that the embedded CLIP
has never seen, and measures class-balanced accuracy before and after: on the classes trained on, on
classes never trained on, and on the styles of the pretraining. Saves the adapter, loads it in a
fresh process, which has to compute the same numbers bit for bit, and draws predictions before and
after. `--data` takes a folder with one subfolder of pictures a class: half of the classes are
trained on. Every option of `transformers.TrainingArguments` is accepted as well.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, HfArgumentParser, TrainingArguments

import graftune
from graftune.integrations.data import (
    ImageCollator,
    Selection,
    few_shot,
    load_images,
    open_image,
    select_classes,
    split_classes,
)

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "clip"
TRAINED, OTHERS = "classes trained on", "classes never trained on"


def option(default: Any, text: str, *names: str) -> Any:
    """A field of a dataclass of options, with its help and its other names."""
    return field(default=default, metadata={"help": text, "aliases": list(names)})


@dataclass
class Options:
    """What to train on what."""

    model: str = option(str(EMBEDDED), "A CLIP or SigLIP of transformers: Hub id or folder.")
    data: str | None = option(None, "A folder with a subfolder a class, or a data set on the Hub.")
    method: str = option("flora", "A graftune recipe, or lora.")
    rank: int = option(8, "Rank of the adapter.")
    shots: int = option(16, "Training pictures a class.")
    split: str = option("test", "What to ask about: test, or validation to choose settings.")
    template: str = option("a picture of {}", "The text of a class; {} is its name.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with defaults for this task."""

    output_dir: str = option("outputs/clip_few_shot", "Where the results go.", "--output")
    seed: int = 0
    learning_rate: float = 3e-3
    max_steps: int = 100
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_strategy: str = "no"
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


@dataclass
class Question:
    """Pictures with labels, and the names of the classes they are to be told apart by."""

    about: str
    pictures: Dataset
    class_names: list[str]
    kept: bool = False  # about what the model could do before, not about what it is trained on


@dataclass
class Task:
    """What is trained on, and what is asked before and after; the first two belong to the style."""

    train: Dataset
    questions: list[Question] = field(default_factory=list)
    selection: Selection | None = None  # what is trained on, where the pictures are the user's own


def embedded_pictures(shots: int, seed: int, split: str) -> Task:
    """The benchmark's task (embedded/task.py): a style of line art, by subcategories of emoji."""
    from embedded import task as benchmark
    from embedded.pictures import all_emoji, subcategory_text

    def pictures(images: np.ndarray, labels: torch.Tensor) -> Dataset:
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        return Dataset.from_dict(rows)

    drawn = benchmark.few_shot_task(seed, shots)
    base, novel = getattr(drawn, f"{split}_base"), getattr(drawn, f"{split}_novel")
    questions = [
        Question(TRAINED, pictures(base.images, base.labels), [*drawn.base_classes]),
        Question(OTHERS, pictures(novel.images, novel.labels), [*drawn.novel_classes]),
    ]
    names = [emoji.name for emoji in all_emoji()]
    kinds = [subcategory_text(name) for name in benchmark.all_subcategories()]
    for which, styles in (("seen", "styles of the pretraining"), ("near", "a style near them")):
        images, by_name, by_kind = benchmark.old_pictures(which, split)
        questions += [
            Question(f"{styles}: names", pictures(images, by_name), names, kept=True),
            Question(f"{styles}: kinds", pictures(images, by_kind), kinds, kept=True),
        ]
    return Task(pictures(drawn.train.images, drawn.train.labels), questions)


def own_pictures(source: str, shots: int, seed: int) -> Task:
    """Train on a few pictures of half of the classes; ask about the other pictures, and classes."""
    data = load_images(source)
    names = data.features["label"].names
    if len(names) < 4:
        raise ValueError(f"{source} has {len(names)} classes; four are needed, two to train on")
    trained_names, other_names = split_classes(names, seed)
    trained = select_classes(data, trained_names)
    chosen, rest = few_shot(trained["label"], shots, seed)
    train = trained.select(chosen)
    return Task(
        train,
        [
            Question(TRAINED, trained.select(rest), trained_names),
            Question(OTHERS, select_classes(data, other_names), other_names),
        ],
        Selection.of(train["row"], source, "train", seed, shots, trained_names),
    )


def load(name: str) -> tuple[Any, Any]:
    """Return the pretrained model, in float32, and its processor."""
    model = AutoModel.from_pretrained(name, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(name)


def ask(trainer: graftune.Trainer, task: Task, objective: Any) -> list[dict[str, Any]]:
    """Return accuracy and predictions for every question of the task."""
    answers = []
    for question in task.questions:
        trainer.objective = objective.with_class_names(question.class_names)
        output = trainer.predict(question.pictures, metric_key_prefix="test")
        answers.append(
            {
                "accuracy": output.metrics["test_balanced_accuracy"],
                "predictions": output.predictions.argmax(-1),
            }
        )
    return answers


def accuracies(task: Task, before: list[Any], after: list[Any]) -> dict[str, list[float]]:
    """Return the accuracies before and after, in percent, by question, and the mean of the kept."""
    answers = zip(before, after, strict=True)
    pairs = [[100 * old["accuracy"], 100 * new["accuracy"]] for old, new in answers]
    table = {question.about: pair for question, pair in zip(task.questions, pairs, strict=True)}
    kept = [table[question.about] for question in task.questions if question.kept]
    return {**table, "kept: mean of these": np.mean(kept, axis=0).tolist()} if kept else table


def report(accuracy: dict[str, list[float]]) -> Table:
    """Return the table of accuracies."""
    table = Table("Class-balanced accuracy", title="Before and after, in %")
    for name in ("zero-shot", "adapted", "change"):
        table.add_column(name, justify="right")
    for about, (old, new) in accuracy.items():
        colour = "green" if new >= old else "red"
        table.add_row(about, f"{old:.1f}", f"{new:.1f}", f"[{colour}]{new - old:+.1f}")
    return table


def draw(
    task: Task, before: list[Any], after: list[Any], file: Path, seed: int, columns: int = 8
) -> None:
    """Draw pictures of the first two questions with both predictions.

    They are chosen at random among those that only one of the two models gets right, while there
    are any: the others show nothing of the change.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    questions = list(zip(task.questions, before, after, strict=True))[:2]
    figure, axes = pyplot.subplots(
        len(questions), columns, figsize=(2 * columns, 2.9 * len(questions)), squeeze=False
    )
    generator = torch.Generator().manual_seed(seed)
    for row, (question, old, new) in zip(axes, questions, strict=True):
        change = f"{100 * old['accuracy']:.0f} % → {100 * new['accuracy']:.0f} %"
        row[0].set_ylabel(f"{question.about}\n{change}")
        labels = np.asarray(question.pictures["label"])
        changed = (old["predictions"] == labels) != (new["predictions"] == labels)
        order = torch.randperm(len(labels), generator=generator).tolist()
        chosen = sorted(order, key=lambda index: not changed[index])[:columns]
        for axis, index in zip(row, chosen, strict=False):
            example = question.pictures[index]
            axis.imshow(open_image(example["image"]))
            axis.set_title(question.class_names[example["label"]], fontsize=9, fontweight="bold")
            for height, word, answer in ((-0.10, "before", old), (-0.22, "after", new)):
                label = int(answer["predictions"][index])
                colour = "tab:green" if label == example["label"] else "tab:red"
                text = f"{word}: {question.class_names[label]}"
                axis.text(
                    0.5,
                    height,
                    text,
                    color=colour,
                    fontsize=8,
                    ha="center",
                    transform=axis.transAxes,
                )
        for axis in row:
            axis.set(xticks=[], yticks=[])
    title = "Accuracy before and after, and pictures that only one of the two gets right"
    figure.suptitle(title, y=0.97)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


@torch.no_grad()
def verify(folder: Path) -> None:
    """Load the adapter, and compare its outputs with those of the process that trained it."""
    settings = json.loads((folder / "results.json").read_text())
    expected = load_file(folder / "outputs.safetensors")
    device = settings["device"]
    torch.set_num_threads(settings["threads"])
    base, processor = load(settings["model"])
    model = graftune.load(base, folder / "adapter").to(device).eval()
    objective = graftune.ClassNameClassifier(
        settings["class_names"], processor, settings["template"]
    )
    logits = objective(model, expected["pixel_values"].to(device))["logits"].cpu()
    if not torch.equal(logits, expected["logits"]):
        worst = (logits - expected["logits"]).abs().max().item()
        raise SystemExit(f"the reloaded adapter's outputs differ by up to {worst:.3g}")
    print(f"Loaded in a fresh process: {logits.numel()} outputs equal bit for bit.")


@torch.no_grad()
def save(
    trainer: graftune.Trainer, options: Options, task: Task, objective: Any, results: dict[str, Any]
) -> None:
    """Write the adapter, the results, and outputs for `verify` to compare."""
    folder = Path(str(trainer.args.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    model.save_pretrained(folder / "adapter")
    first = task.questions[0].pictures
    batch = trainer.data_collator([first[i] for i in range(min(16, len(first)))])
    pixels = batch["pixel_values"].to(trainer.args.device)
    outputs = {"pixel_values": pixels, "logits": objective(model, pixels)["logits"]}
    save_file({k: v.cpu().contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")
    settings = {
        **dataclasses.asdict(options),
        **{k: getattr(trainer.args, k) for k in ("seed", "learning_rate", "max_steps")},
        "class_names": objective.class_names,
        "trained_on": task.selection and dataclasses.asdict(task.selection),
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (graftune, torch, transformers)},
    }
    (folder / "results.json").write_text(json.dumps({**settings, **results}, indent=2))


def main() -> None:
    # Before anything of the launcher's environment is read: this runs in a process of its own.
    if sys.argv[1:2] == ["--verify"]:
        return verify(Path(sys.argv[2]))
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    folder = Path(args.output_dir)

    base, processor = load(options.model)
    if options.data:
        task = own_pictures(options.data, options.shots, args.seed)
    else:
        task = embedded_pictures(options.shots, args.seed, options.split)
    objective = graftune.ClassNameClassifier(
        task.questions[0].class_names, processor, options.template
    )
    method: Any = LoraConfig(r=options.rank) if options.method == "lora" else options.method
    model: PeftModel = graftune.wrap(base, method, r=options.rank)
    trainer = graftune.Trainer(
        model,
        args,
        objective=objective,
        train_dataset=task.train,
        data_collator=ImageCollator(processor),
    )

    say = Console(quiet=not trainer.is_world_process_zero()).print
    say(f"[bold]Asking the pretrained model[/] about {len(task.questions)} sets of pictures")
    before = ask(trainer, task, objective)
    say(f"[bold]Training[/] {options.method} on {len(task.train)} pictures")
    trainer.objective = objective
    trainer.train()
    say("[bold]Asking the adapted model[/]")
    after = ask(trainer, task, objective)

    if trainer.is_world_process_zero():
        accuracy = accuracies(task, before, after)
        save(trainer, options, task, objective, {"accuracies": accuracy})
        draw(task, before, after, folder / "predictions.png", args.seed)
        trained, total = model.get_nb_trainable_parameters()
        size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        say(report(accuracy))
        say(
            f"{options.method}, rank {options.rank}: {trained:,} of {total:,} parameters trained "
            f"on {len(task.train)} pictures; the adapter has {size / 1024:.0f} KiB."
        )
        say(f"Written to {folder}: adapter, results.json, predictions.png")
        command = [sys.executable, __file__, "--verify", str(folder)]
        subprocess.run(command, check=True)
    trainer.end()


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.utils.logging.disable_progress_bar()
    main()
