"""The few-shot task shows gain and forgetting: zero-shot against full fine-tuning.

    python benchmarks/few_shot_task.py            # ten seeds, the frozen settings, the test split
    python benchmarks/few_shot_task.py --search   # the settings' choice, on the validation split

Plain fine-tuning of all weights is the yardstick that adaptation methods are compared with on
`embedded.task`. Prints a table and writes `benchmarks/results/few_shot_task.json`.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import environment, write_json
from transformers import CLIPModel, CLIPProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from embedded.model import load_clip
from embedded.pictures import FAR, NEAR, NEGATIVE
from embedded.task import (
    NEW_STYLE,
    FewShotTask,
    features_of,
    few_shot_task,
    pixel_values,
    prompts,
)

RESULTS = Path(__file__).resolve().parent / "results"
MEASURES = ("base", "novel", "kept")


@dataclass(frozen=True)
class Settings:
    """What is trained on and how; the defaults are the frozen choice."""

    style: str = NEW_STYLE
    shots: int = 16
    learning_rate: float = 3e-4
    steps: int = 100
    batch: int = 32


def fine_tune(
    model: CLIPModel, processor: CLIPProcessor, task: FewShotTask, settings: Settings
) -> None:
    """Train all weights of both towers in place: pictures against the base classes' names."""
    generator = torch.Generator().manual_seed(task.seed)
    texts = processor(text=prompts(task.base_classes), padding=True, return_tensors="pt")
    pixels = pixel_values(task.train.images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        rows = torch.randperm(len(pixels), generator=generator)[: settings.batch]
        images = model.get_image_features(pixel_values=pixels[rows]).pooler_output
        names = model.get_text_features(**texts).pooler_output
        similarity = F.normalize(images, dim=-1) @ F.normalize(names, dim=-1).T
        loss = F.cross_entropy(model.logit_scale.exp() * similarity, task.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def run(
    base: CLIPModel, processor: CLIPProcessor, seed: int, settings: Settings, split: str
) -> dict[str, Any]:
    """Scores before and after full fine-tuning, for one seed."""
    task = few_shot_task(seed=seed, shots=settings.shots, style=settings.style)
    before = task.score(*features_of(base, processor), split=split)
    model = copy.deepcopy(base)
    start = time.perf_counter()
    fine_tune(model, processor, task, settings)
    seconds = time.perf_counter() - start
    after = task.score(*features_of(model.eval(), processor), split=split)
    return {"seed": seed, "zero-shot": before, "full fine-tuning": after, "seconds": seconds}


def paired(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Mean of both, and of the difference per seed, with its standard error and its signs."""
    before = [run["zero-shot"][key] for run in runs]
    after = [run["full fine-tuning"][key] for run in runs]
    change = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(change) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return {
        "zero-shot": statistics.mean(before),
        "full fine-tuning": statistics.mean(after),
        "difference": statistics.mean(change),
        "standard error": error,
        "seeds up": sum(c > 0 for c in change),
        "seeds down": sum(c < 0 for c in change),
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| | zero-shot | full fine-tuning | difference (standard error) | seeds up / down |",
        "|---|---|---|---|---|",
    ]
    for key, row in summary.items():
        lines.append(
            f"| {key} | {row['zero-shot']:.1f} | {row['full fine-tuning']:.1f}"
            f" | {row['difference']:+.1f} ({row['standard error']:.1f})"
            f" | {row['seeds up']} / {row['seeds down']} |"
        )
    return "\n".join(lines)


def search(base: CLIPModel, processor: CLIPProcessor, seeds: int) -> None:
    """Print what styles, shots and learning rates do, on the validation split."""
    grid = [
        *product((NEW_STYLE,), (16,), (3e-4, 1e-3, 1e-4)),
        *product((FAR, NEAR, NEAR + NEGATIVE), (16,), (3e-4,)),
        (NEW_STYLE, 4, 3e-4),
    ]
    found = []
    for style, shots, rate in grid:
        settings = Settings(style, shots, rate)
        runs = [run(base, processor, seed, settings, "validation") for seed in range(seeds)]
        rows = {key: paired(runs, key) for key in MEASURES}
        found.append({"settings": asdict(settings), "summary": rows})
        write_json(RESULTS / "few_shot_task_search.json", {"seeds": seeds, "runs": found})
        shown = ", ".join(
            f"{key} {row['zero-shot']:.1f} {row['difference']:+.1f}" for key, row in rows.items()
        )
        print(f"{style}, {shots} shots, rate {rate:g}: {shown}", flush=True)


def measure(base: CLIPModel, processor: CLIPProcessor, seeds: int, settings: Settings) -> None:
    """Print and write the test split's numbers for the given settings."""
    runs = []
    for seed in range(seeds):
        runs.append(run(base, processor, seed, settings, "test"))
        print(f"seed {seed}: {runs[-1]['seconds']:.0f} s of training", flush=True)
    summary = {key: paired(runs, key) for key in runs[0]["zero-shot"]}
    print(table(summary))
    result = {
        "settings": asdict(settings),
        "split": "test",
        "summary": summary,
        "runs": runs,
        "environment": environment("cpu", ["torch", "transformers"]),
    }
    write_json(RESULTS / "few_shot_task.json", result)


def main() -> None:
    """Search or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", action="store_true", help="on the validation split")
    parser.add_argument("--seeds", type=int, default=None, help="default: 10, 2 in the search")
    parser.add_argument("--shots", type=int, default=Settings.shots)
    parser.add_argument("--style", default=Settings.style)
    args = parser.parse_args()
    base, processor = load_clip()
    if args.search:
        search(base, processor, args.seeds or 2)
    else:
        measure(base, processor, args.seeds or 10, Settings(style=args.style, shots=args.shots))


if __name__ == "__main__":
    main()
