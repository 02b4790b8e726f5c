"""What a training step of PromptSRC costs at ViT-B/16 shapes, with and without cutting the texts.

    python benchmarks/promptsrc_speed.py [--quick] [--classes 10 100 1000]

One step is forward and backward of 4 pictures against the names of C classes, with 4 + 4 prompts in
9 blocks. Forms, timed in turns:

- **PromptSRC**: prompts with self-regulation; texts end at the longest end of text;
- **plain**: the same prompts without regularizers, plus **frozen image**, one forward pass of the
  frozen vision tower: what a step cannot do without;
- **uncut**: PromptSRC with every text padded to the model's 77 positions.

The floor in operations is counted tower by tower: the student's forward and backward, the frozen
forward, and forward and backward of the cut texts.

At 1000 classes the uncut step's activations do not fit into ordinary memory: there all forms run
with gradient checkpointing, which costs each of them one more forward pass, and no floor has that.

To reach: at least 3 × faster than uncut at 1000 classes; at most 1.10 × plain + frozen image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    environment,
    flops,
    interleaved,
    memory_method,
    peak_bytes,
    ratio,
    summary,
    write_json,
)
from rich.console import Console
from rich.table import Table
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import graftune
from embedded.model import load_clip
from embedded.pictures import all_emoji
from graftune.adapters.base.frozen import frozen_base

RESULT = Path(__file__).parent / "results" / "promptsrc_speed.json"
SEED = 0
PICTURES, CHUNK = 4, 100  # CHUNK: class texts at a time where operations are counted
CUT_TARGET, FLOOR_TARGET = 3.0, 1.10
PACKAGES = ["graftune", "torch", "peft", "transformers"]


def build(tokenizer: Any, quick: bool) -> CLIPModel:
    """A CLIP of ViT-B/16's shapes with random weights, for the embedded tokenizer's ids."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision: dict[str, Any] = {"patch_size": 16}
    if quick:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        text, vision = {**text, **narrow}, {**vision, **narrow}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).train()


@dataclass
class Setting:
    """One model, adapted, and one batch, at a number of classes."""

    model: Any
    objective: graftune.ClassNameClassifier
    uncut: graftune.ClassNameClassifier
    batch: dict[str, torch.Tensor]
    checkpointed: bool

    @classmethod
    def of(cls, count: int, quick: bool, checkpointed: bool) -> Setting:
        torch.manual_seed(SEED)
        tokenizer = load_clip()[1].tokenizer
        base = build(tokenizer, quick)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = graftune.wrap(base, "promptsrc", tokenizer=tokenizer)
        names = [emoji.name for emoji in all_emoji()][:count]
        objective = graftune.ClassNameClassifier(names, tokenizer)
        uncut = objective.with_class_names(names)
        uncut._tokens = dict(
            tokenizer(uncut.texts(), return_tensors="pt", padding="max_length", max_length=77)
        )
        labels = torch.arange(PICTURES) % count
        batch = {"pixel_values": torch.randn(PICTURES, 3, 224, 224), "labels": labels}
        return cls(model, objective, uncut, batch, checkpointed)

    def tokens(self, objective: graftune.ClassNameClassifier) -> torch.Tensor:
        """The token ids of the class texts, (C, length)."""
        return objective.tokens(self.model, torch.device("cpu"))["input_ids"]

    def forms(self) -> dict[str, Callable[[], object]]:
        """The forms of a step."""
        # How many templates there are is no part of a step: their features are computed once.
        regulation = graftune.SelfRegulation(templates=["a photo of a {}.", "a drawing of a {}."])
        regularized = graftune.Regularization(self.model, [regulation])
        bare = graftune.Regularization(self.model, [])

        def step(regularization: graftune.Regularization, objective: Any) -> None:
            self.model.zero_grad()
            regularization(objective, self.model, self.batch)["loss"].backward()

        def frozen_image() -> None:
            with frozen_base(self.model):
                base = self.model.get_base_model()
                base.get_image_features(pixel_values=self.batch["pixel_values"])

        return {
            "PromptSRC": lambda: step(regularized, self.objective),
            "plain": lambda: step(bare, self.objective),
            "frozen image": frozen_image,
            "uncut": lambda: step(regularized, self.uncut),
        }

    def floor(self) -> int:
        """Operations of what a step cannot do without, tower by tower, nothing recomputed."""
        base, pixels = self.model.get_base_model(), self.batch["pixel_values"]
        if self.checkpointed:
            base.gradient_checkpointing_disable()

        def image() -> None:
            base.get_image_features(pixel_values=pixels).pooler_output.sum().backward()

        def text(ids: torch.Tensor) -> None:
            base.get_text_features(input_ids=ids).pooler_output.sum().backward()

        counted = flops(image) + flops(self.forms()["frozen image"])
        for part in self.tokens(self.objective).split(CHUNK):
            counted += flops(partial(text, part))
        if self.checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return counted


def measure(count: int, rounds: int, quick: bool, checkpoint_from: int) -> dict[str, Any]:
    """Time, memory and operations of all forms at a number of classes."""
    setting = Setting.of(count, quick, checkpointed=count >= checkpoint_from)
    forms = setting.forms()
    times = interleaved(forms, rounds)  # the round before fills what is computed once
    pairs = zip(times["plain"], times["frozen image"], strict=True)
    least = [plain + frozen for plain, frozen in pairs]
    floor, counted = setting.floor(), flops(forms["PromptSRC"])
    return {
        "classes": count,
        "checkpointed": setting.checkpointed,
        "tokens": {
            "cut": setting.tokens(setting.objective).shape[1],
            "uncut": setting.tokens(setting.uncut).shape[1],
        },
        "seconds": {name: summary(values) for name, values in times.items()},
        "uncut over PromptSRC": ratio(times["uncut"], times["PromptSRC"]),
        "PromptSRC over plain + frozen image": ratio(times["PromptSRC"], least),
        "flops": {"PromptSRC": counted, "floor": floor},
        "flops over floor": counted / floor,
        "peak bytes": {name: peak_bytes(forms[name]) for name in ("PromptSRC", "plain", "uncut")},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each number of classes."""
    shown = Table("classes", "tokens", "PromptSRC, s", "over plain + frozen", "FLOPs over floor")
    for name in ("uncut over it", "peak, MiB", "uncut, MiB"):
        shown.add_column(name)
    for row in rows:
        peak = row["peak bytes"]
        shown.add_row(
            f"{row['classes']}{' (checkpointed)' if row['checkpointed'] else ''}",
            f"{row['tokens']['cut']} of {row['tokens']['uncut']}",
            f"{row['seconds']['PromptSRC']['median']:.2f}",
            f"{row['PromptSRC over plain + frozen image']:.2f}",
            f"{row['flops over floor']:.2f}",
            f"{row['uncut over PromptSRC']:.1f}",
            f"{peak['PromptSRC'] / 2**20:,.0f}",
            f"{peak['uncut'] / 2**20:,.0f}",
        )
    return shown


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, and whether it is."""
    name = "PromptSRC over plain + frozen image"
    found = [
        {
            "classes": row["classes"],
            "target": f"{name} ≤ {FLOOR_TARGET}",
            "measured": row[name],
            "met": row[name] <= FLOOR_TARGET,
        }
        for row in rows
    ]
    most = max(rows, key=lambda row: row["classes"])
    cut = most["uncut over PromptSRC"]
    goal = {"classes": most["classes"], "target": f"uncut over PromptSRC ≥ {CUT_TARGET}"}
    return [*found, {**goal, "measured": cut, "met": cut >= CUT_TARGET}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint_from", type=int, default=1000, help="a number of classes")
    parser.add_argument("--quick", action="store_true", help="a narrow model, for a look")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for count in args.classes:
        rows.append(measure(count, args.rounds, args.quick, args.checkpoint_from))
        print(f"{count} classes: done", flush=True)
    judged = targets(rows)
    Console().print(table(rows))
    for target in judged:
        said = f"{target['classes']} classes: {target['target']}: {target['measured']:.2f}"
        print(f"{said}, {'met' if target['met'] else 'missed'}")
    settings = {
        "seed": SEED,
        "pictures": PICTURES,
        "rounds": args.rounds,
        "narrow": args.quick,
        "checkpoint_from": args.checkpoint_from,
        "memory": memory_method("cpu"),
    }
    result = {"settings": settings, "rows": rows, "targets": judged}
    write_json(args.json, {**result, "environment": environment("cpu", PACKAGES)})


if __name__ == "__main__":
    main()
