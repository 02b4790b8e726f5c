"""What the claims of the papers are measured with: variants of training on the embedded task.

A variant is an adapter with regularizers. Its learning rate is chosen on the validation split of
some seeds, by the harmonic mean of base and novel accuracy; what is reported is the test split of
others. Every run's row is written as it is made, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import graftune
from embedded.model import load_clip
from embedded.results import Results
from embedded.task import TEMPLATE, FewShotTask, features_of, few_shot_task
from graftune.integrations.data.images import ImageCollator
from graftune.integrations.protocols import harmonic_mean

RESULTS = Path(__file__).resolve().parent / "results"
MEASURES = ("base", "novel", "harmonic mean", "kept")
SEARCH_SEEDS = (100, 101)  # none of those that are reported
Wrap = Callable[[nn.Module, Any], nn.Module]
Measure = Callable[[nn.Module, Any, int, str], dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """A way of adapting the embedded CLIP.

    Args:
        name: what it is called in tables.
        wrap: attaches the adapter, given the base model and its processor.
        rates: learning rates to choose from.
        of: the name of the variant whose rate it takes, instead of choosing one.
        after: a variant that is trained before, at its own rate, and then stays as it is: `wrap` is
            given its model.
        measure: what else to measure, given the trained model, its processor, seed and split.
        arguments: of the trainer, other than the shared ones.
    """

    name: str
    wrap: Wrap
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    of: str | None = None
    after: Variant | None = None
    measure: Measure | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What all variants share."""

    shots: int = 16
    epochs: int = 12
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search_seeds: tuple[int, ...] = SEARCH_SEEDS


@dataclass
class Claim:
    """A sentence about the measured numbers, and whether they bear it out."""

    text: str
    holds: bool
    numbers: str = field(default="")


def scores(model: nn.Module, processor: Any, task: FewShotTask, split: str) -> dict[str, float]:
    """Return base, novel, their harmonic mean and kept, in percent."""
    found = task.score(*features_of(model.eval(), processor), split=split)
    found["harmonic mean"] = harmonic_mean(found["base"], found["novel"])
    return {name: found[name] for name in MEASURES}


def rows_of(task: FewShotTask) -> list[dict[str, Any]]:
    """The training pictures, as a data set."""
    pairs = zip(task.train.images, task.train.labels.tolist(), strict=True)
    return [{"image": Image.fromarray(image), "label": label} for image, label in pairs]


def train(
    variant: Variant, rates: Mapping[str, float], seed: int, split: str, settings: Settings
) -> dict[str, float]:
    """Train a variant on a seed's task, and return its scores on a split of it.

    Args:
        variant: what to train.
        rates: learning rates, its own and that of the variant it comes after, by name.
        seed: of the task and of all else that is drawn.
        split: "validation" or "test".
        settings: what all variants share.
    """
    task = few_shot_task(seed=seed, shots=settings.shots)
    model, processor = trained(variant, rates, task, settings)
    found = scores(model, processor, task, split)
    if variant.measure is not None:
        found |= variant.measure(model, processor, seed, split)
    return {**found, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def trained(
    variant: Variant, rates: Mapping[str, float], task: FewShotTask, settings: Settings
) -> tuple[nn.Module, Any]:
    """Train a variant on a task, after the one it comes after; return the model and processor."""
    if variant.after is None:
        base, processor = load_clip()
    else:
        base, processor = trained(variant.after, rates, task, settings)
        base.requires_grad_(False)  # an adapter that is frozen stays so under another
    set_seed(task.seed)
    model = variant.wrap(base, processor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = graftune.Trainer(
            model,
            TrainingArguments(
                folder,
                learning_rate=rates[variant.name],
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                seed=task.seed,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=True,
                **variant.arguments,
            ),
            objective=graftune.ClassNameClassifier(list(task.base_classes), processor, TEMPLATE),
            train_dataset=rows_of(task),
            data_collator=ImageCollator(processor),
        )
        trainer.train()
    return model, processor


def zero_shot(seed: int, split: str, settings: Settings) -> dict[str, float]:
    """Return the scores of the pretrained model on a seed's task."""
    return scores(*load_clip(), few_shot_task(seed=seed, shots=settings.shots), split)


def fill_in(variants: Sequence[Variant], results: Results, settings: Settings) -> None:
    """Fill in the rows that are missing: the search, then the test split at the chosen rates."""
    for seed in settings.seeds:
        if not results.has(variant="zero-shot", seed=seed, split="test"):
            found = zero_shot(seed, "test", settings)
            results.add(
                {"variant": "zero-shot", "rate": 0.0, "seed": seed, "split": "test", **found}
            )
    for variant in variants:
        searched = (
            [] if variant.of else [(r, s) for r in variant.rates for s in settings.search_seeds]
        )
        runs = [(rate, seed, "validation") for rate, seed in searched]
        _fill(variant, runs, results, settings)
        rate = chosen_rate(results.rows, variant.of or variant.name)
        _fill(variant, [(rate, seed, "test") for seed in settings.seeds], results, settings)


def _fill(
    variant: Variant, runs: Sequence[tuple[float, int, str]], results: Results, settings: Settings
) -> None:
    for rate, seed, split in runs:
        key = {"variant": variant.name, "rate": rate, "seed": seed, "split": split}
        if not results.has(**key):
            rates = {variant.name: rate}
            if variant.after is not None:
                rates[variant.after.name] = chosen_rate(results.rows, variant.after.name)
            found = train(variant, rates, seed, split, settings)
            results.add({**key, **found})
            shown = ", ".join(f"{name} {found[name]:.1f}" for name in MEASURES)
            print(f"{variant.name}, rate {rate:g}, seed {seed}, {split}: {shown}", flush=True)


def chosen_rate(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the rate with the best mean harmonic mean on the validation split."""
    return chosen(rows, name, ("rate",), "harmonic mean")[0]


def chosen(
    rows: Sequence[Mapping[str, Any]], name: str, settings: Sequence[str], measure: str
) -> tuple[float, ...]:
    """Return the values of settings with the best mean of a measure on the validation split."""
    found: dict[tuple[float, ...], list[float]] = {}
    for row in rows:
        if row["variant"] == name and row["split"] == "validation":
            found.setdefault(tuple(row[each] for each in settings), []).append(row[measure])
    return max(found, key=lambda values: statistics.mean(found[values]))


def test_scores(rows: Sequence[Mapping[str, Any]], name: str, measure: str) -> list[float]:
    """Return a variant's scores on the test split, in the order of the seeds."""
    kept = [row for row in rows if row["variant"] == name and row["split"] == "test"]
    return [row[measure] for row in sorted(kept, key=lambda row: row["seed"])]


def paired(rows: Sequence[Mapping[str, Any]], one: str, other: str, measure: str) -> list[float]:
    """Return, seed by seed, by how much one variant is above another."""
    pairs = zip(test_scores(rows, one, measure), test_scores(rows, other, measure), strict=True)
    return [a - b for a, b in pairs]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def difference(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and standard error of paired differences, and in how many seeds they are up."""
    mean, error = mean_and_error(values)
    up = sum(value > 0 for value in values)
    return f"{mean:+{form}} ± {error:{form}}, up in {up} of {len(values)} seeds"


def superior(text: str, *compared: tuple[str, Sequence[float]], form: str = ".1f") -> Claim:
    """Return the claim that paired differences are above zero, by more than two standard errors.

    Args:
        text: the claim.
        compared: what is told before each comparison's numbers, and its differences; all have to
            be above.
        form: of the numbers.
    """
    told, clear = [], []
    for about, values in compared:
        mean, error = mean_and_error(values)
        clear.append(mean > 2 * error)
        noise = " (no more than noise)" if 0 < mean <= 2 * error else ""
        told.append(f"{about} {difference(values, form)}{noise}")
    return Claim(text, all(clear), "; ".join(told))


def plot(rows: Sequence[Mapping[str, Any]], names: Sequence[str], file: Path) -> None:
    """Draw every variant's means with standard deviations over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(MEASURES), figsize=(4 * len(MEASURES), 0.4 * len(names) + 1.5)
    )
    for axis, measured in zip(axes, MEASURES, strict=True):
        values = [test_scores(rows, name, measured) for name in names]
        means = [statistics.mean(v) for v in values]
        axis.barh(range(len(names)), means, xerr=[statistics.stdev(v) for v in values])
        axis.set(title=f"{measured}, %", yticks=range(len(names)), yticklabels=names)
        axis.invert_yaxis()
    for axis in axes[1:]:
        axis.set_yticklabels([])
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def table(
    rows: Sequence[dict[str, Any]], names: Sequence[str], measures: Sequence[str] = MEASURES
) -> Table:
    """Means and standard deviations over the seeds."""
    shown = Table("%", title="Test split, mean and standard deviation over the seeds")
    for measured in measures:
        shown.add_column(measured, justify="right")
    shown.add_column("trained", justify="right")
    for name in names:
        cells = []
        for measured in measures:
            values = test_scores(rows, name, measured)
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        trained = next((row.get("trained", 0) for row in rows if row["variant"] == name), 0)
        shown.add_row(name, *cells, f"{trained:,.0f}")
    return shown


def report(
    description: str | None,
    file: Path,
    variants: Callable[[int], list[Variant]],
    claims: Callable[[Sequence[dict[str, Any]]], list[Claim]],
) -> None:
    """Run a benchmark of claims as a script: measure what is missing, judge, print and plot.

    Args:
        description: what --help says.
        file: where results go unless the command line says otherwise; the plot goes beside it.
        variants: what is compared, given the number of epochs.
        claims: judges the rows.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=file)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(epochs=args.epochs, seeds=tuple(range(args.seeds)))
    compared = variants(args.epochs)
    results = Results(args.results, dataclasses.asdict(settings))
    fill_in(compared, results, settings)

    names = ["zero-shot", *(variant.name for variant in compared)]
    conclude(args.results, results.rows, names, claims(results.rows))
    plot(results.rows, names, args.results.with_suffix(".png"))


def conclude(
    file: Path,
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    judged: Sequence[Claim],
    measures: Sequence[str] = MEASURES,
) -> None:
    """Print the table and the claims, and write the claims into the file of the rows."""
    console = Console(width=120)
    console.print(table(rows, names, measures))
    for claim in judged:
        verdict = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        console.print(f"{verdict}: {claim.text} ({claim.numbers})")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["claims"] = [dataclasses.asdict(claim) for claim in judged]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
