"""What a training step of PromptSRC costs at ViT-B/16 shapes, with and without cutting the texts.

    python benchmarks/promptsrc_speed.py [--quick] [--classes 10 100 1000]

One step is forward and backward of 4 pictures against the names of C classes, with 4 + 4 prompts in
9 blocks. Forms, timed in turns:

- **PromptSRC**: prompts with self-regulation; texts end at the longest end of text;
- **plain**: the same prompts without regularizers, plus **frozen image**, one forward pass of the
  frozen vision tower: the floor;
- **uncut**: PromptSRC with every text padded to the model's 77 positions.

At 1000 classes the uncut step's activations do not fit into ordinary memory: there all forms run
with gradient checkpointing, which costs each of them one more forward pass.

To reach: at least 3 × faster than uncut at 1000 classes; at most 1.10 × plain + frozen image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, flops, interleaved, peak_bytes, summary, write_json
from rich.console import Console
from rich.table import Table
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import graftune
from embedded.model import load_clip
from embedded.pictures import all_emoji
from graftune.adapters.frozen import frozen_base

RESULT = Path(__file__).parent / "results" / "promptsrc_speed.json"
CUT_TARGET, FLOOR_TARGET = 3.0, 1.10
FORMS = ("PromptSRC", "plain", "frozen image", "uncut")
CHECKPOINTED_FROM = 1000  # classes


def build(tokenizer: Any, small: bool) -> CLIPModel:
    """A CLIP of ViT-B/16's shapes with random weights, for the embedded tokenizer's ids."""
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision: dict[str, Any] = {"patch_size": 16}
    if small:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).train()


def steps(count: int, small: bool) -> dict[str, Callable[[], object]]:
    """The forms of a step at a number of classes, on one model."""
    tokenizer = load_clip()[1].tokenizer
    base = build(tokenizer, small)
    if count >= CHECKPOINTED_FROM:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = graftune.wrap(base, "promptsrc", tokenizer=tokenizer)
    names = [emoji.name for emoji in all_emoji()][:count]
    objective = graftune.ClassNameClassifier(names, tokenizer)
    batch = {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.arange(4)}
    regularizer = graftune.SelfRegulation(templates=["a photo of a {}.", "a drawing of a {}."])
    regularized = graftune.Regularization(model, [regularizer])
    bare = graftune.Regularization(model, [])

    def step(regularization: graftune.Regularization, objective: Any) -> None:
        model.zero_grad()
        regularization(objective, model, batch)["loss"].backward()

    def frozen_image() -> None:
        with frozen_base(model):
            base.get_image_features(pixel_values=batch["pixel_values"])

    padded = objective.with_class_names(names)
    padded._tokens = dict(
        tokenizer(padded.texts(), return_tensors="pt", padding="max_length", max_length=77)
    )
    return {
        "PromptSRC": lambda: step(regularized, objective),
        "plain": lambda: step(bare, objective),
        "frozen image": frozen_image,
        "uncut": lambda: step(regularized, padded),
    }


def measure(count: int, rounds: int, small: bool) -> dict[str, Any]:
    """Time, memory and operations of all forms at a number of classes."""
    forms = steps(count, small)
    forms["PromptSRC"]()  # what is computed once for a class list is no part of a step
    times = interleaved(forms, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    floor = median["plain"] + median["frozen image"]
    operations = {name: flops(form) for name, form in forms.items()}
    return {
        "classes": count,
        "checkpointed": count >= CHECKPOINTED_FROM,
        "seconds": {name: summary(values) for name, values in times.items()},
        "uncut over PromptSRC": median["uncut"] / median["PromptSRC"],
        "PromptSRC over floor": median["PromptSRC"] / floor,
        "flops": operations,
        "flops over floor": operations["PromptSRC"]
        / (operations["plain"] + operations["frozen image"]),
        "peak bytes": {name: peak_bytes(forms[name]) for name in ("PromptSRC", "plain")},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each number of classes."""
    shown = Table("classes", "PromptSRC, s", "over floor", "FLOPs over floor", "uncut over it")
    shown.add_column("peak, MiB")
    shown.add_column("over plain")
    for row in rows:
        peak = row["peak bytes"]
        shown.add_row(
            f"{row['classes']}{' (checkpointed)' if row['checkpointed'] else ''}",
            f"{row['seconds']['PromptSRC']['median']:.2f}",
            f"{row['PromptSRC over floor']:.2f}",
            f"{row['flops over floor']:.2f}",
            f"{row['uncut over PromptSRC']:.1f}",
            f"{peak['PromptSRC'] / 2**20:,.0f}",
            f"{peak['PromptSRC'] / peak['plain']:.2f}",
        )
    return shown


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The targets, met or missed by how much."""
    lines = []
    for row in rows:
        over = row["PromptSRC over floor"]
        met = "met" if over <= FLOOR_TARGET else "missed"
        lines.append(f"{row['classes']} classes: over floor ≤ {FLOOR_TARGET}: {over:.2f}, {met}")
    most = rows[-1]
    cut = most["uncut over PromptSRC"]
    met = "met" if cut >= CUT_TARGET else "missed"
    lines.append(f"{most['classes']} classes: uncut / cut ≥ {CUT_TARGET}: {cut:.1f}, {met}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a narrow model, for a look")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for count in args.classes:
        # The uncut step takes minutes at many classes: fewer rounds, of longer steps.
        rows.append(measure(count, args.rounds if count < 1000 else 1, args.quick))
        print(f"{count} classes: done", flush=True)
    Console().print(table(rows))
    print("\n".join(verdicts(rows)))
    packages = ["torch", "peft", "transformers"]
    write_json(args.json, {"rows": rows, "environment": environment("cpu", packages)})


if __name__ == "__main__":
    main()
