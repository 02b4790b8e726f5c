"""What OnePrompt and the prompt pools cost in a ViT-B/16, and how long virtual outliers take.

    python benchmarks/ovor_speed.py            # some ten minutes on two cores
    python benchmarks/ovor_speed.py --quick    # seconds, on a small model

Pictures of 224 pixels, random weights, adapters with their papers' settings, timed in turns:

- inference, without gradients: the **base** model (twice, for the noise) and the adapters;
- a training step of class-incremental learning: forward, cross entropy over the classes of a task,
  backward to prompts and classifier, and one step of Adam. The floor is the **input backward**: the
  frozen model's forward and a backward to what enters its first block, where the first prompt is.
  Pools run the frozen model once more before each forward pass, for their query.

Virtual outliers: 40 around each of 200 classes of 500 features of width 768, as they are drawn and
with **all distances** computed, on some classes, for comparison.

To reach: OnePrompt's inference at most 1.05 × the base model, its step at most 1.10 × the floor,
and all outliers in less than 10 s.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from mask_speed import inference_step
from measure import (
    Step,
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
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import graftune
from graftune.adapters.regularizers.outliers import kth_distance, virtual_outliers
from graftune.integrations.class_incremental.objectives import TaskClassifier
from graftune.integrations.training import regularizers_of

RESULT = Path(__file__).parent / "results" / "ovor_speed.json"
SEED, CLASSES = 0, 100
FLOOR = "input backward"
RECIPES = {
    "OnePrompt": "ovor",
    "L2P": "l2p",
    "DualPrompt": "dual_prompt",
    "CODA-Prompt": "coda_prompt",
}
TARGETS = {"inference": 1.05, "step": 1.10}
OUTLIER_SECONDS = 10.0
PACKAGES = ("graftune", "torch", "peft", "transformers", "timm")


def timm_vit(small: bool) -> nn.Module:
    """A ViT-B/16 of timm with random weights, or a narrow one."""
    width = {"embed_dim": 64, "num_heads": 2} if small else {}
    return timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **width)


def transformers_vit(small: bool) -> nn.Module:
    """The same of transformers."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES, **(sizes if small else {})))


# How a model is made, the name of its blocks and that of its classifier.
LIBRARIES: dict[str, tuple[Callable[[bool], nn.Module], str, str]] = {
    "timm": (timm_vit, "blocks", "head"),
    "transformers": (transformers_vit, "vit.layers", "classifier"),
}


def sharing(base: nn.Module) -> nn.Module:
    """Return a copy of a model that has the same weights in memory."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def adapted(base: nn.Module, head: str) -> dict[str, nn.Module]:
    """Return the model under each of the adapters, without the regularizers of a later phase."""
    return {
        name: graftune.wrap(sharing(base), recipe, modules_to_save=[head])
        for name, recipe in RECIPES.items()
    }


def training_step(model: nn.Module, pixels: Tensor) -> Step:
    """Return a step of the normal phase, Adam's included."""
    kept = [r for r in regularizers_of(model) if r.name != "virtual_outliers"]
    regularization = graftune.Regularization(model.train(), kept)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    batch = {"pixel_values": pixels, "labels": torch.arange(len(pixels))}
    objective = TaskClassifier(range(CLASSES // 10))

    def step() -> None:
        regularization(objective, model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_step(base: nn.Module, blocks: str, pixels: Tensor) -> Step:
    """Return the frozen model's forward and the backward to the input of its first block."""
    frozen = sharing(base).requires_grad_(False).train()

    def ask(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])

    frozen.get_submodule(blocks)[0].register_forward_pre_hook(ask)
    labels = torch.arange(len(pixels))
    objective = TaskClassifier(range(CLASSES // 10))

    def step() -> None:
        objective(frozen, pixel_values=pixels, labels=labels)["loss"].backward()

    return step


def measure_library(library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure inference and steps of a library's model."""
    torch.manual_seed(SEED)
    build, blocks, head = LIBRARIES[library]
    base = build(options.quick).requires_grad_(False)
    pixels = torch.randn(options.batch, 3, 224, 224)
    models = adapted(base, head)
    inference = {"base": inference_step(base.eval(), pixels)}
    inference["base again"] = inference_step(sharing(base), pixels)
    inference |= {name: inference_step(model.eval(), pixels) for name, model in models.items()}
    row: dict[str, Any] = {"library": library}
    row["inference"] = compared(inference, "base", options)
    steps = {FLOOR: floor_step(base, blocks, pixels)}
    steps |= {name: training_step(model, pixels) for name, model in models.items()}
    row["step"] = compared(steps, FLOOR, options)
    row["trained"] = {
        name: sum(p.numel() for key, p in model.named_parameters() if _is_prompt(key, p))
        for name, model in models.items()
    }
    return row


def _is_prompt(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and "modules_to_save" not in name


def compared(steps: Mapping[str, Step], floor: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps in turns, and set them against one of them, in operations and memory too."""
    seconds = interleaved(steps, options.rounds, 1, options.seconds)
    counted = {name: flops(step) for name, step in steps.items()}
    return {
        "floor": floor,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "over floor": {name: ratio(seconds[name], seconds[floor]) for name in steps},
        "flops over floor": {name: count / counted[floor] for name, count in counted.items()},
        "peak bytes": {name: peak_bytes(step) for name, step in steps.items()},
    }


def measure_outliers(options: argparse.Namespace) -> dict[str, Any]:
    """Time the outliers of all classes, and measure the memory that they take."""
    shape = (4, 50, 64) if options.quick else (200, 500, 768)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    few = features[: max(1, len(features) // 50)]
    steps: dict[str, Step] = {
        "boundary": lambda: virtual_outliers(features),
        "origin": lambda: virtual_outliers(features, center="origin"),
        "all distances": lambda: [all_distances(of_class) for of_class in few],
    }
    seconds = interleaved(steps, options.rounds, 1)
    seconds["all distances"] = [s * len(features) / len(few) for s in seconds["all distances"]]
    beside = {name: peak_bytes(steps[name]) for name in ("boundary", "origin")}
    return {
        "classes, features, width": shape,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "features bytes": features.numel() * features.element_size(),
        "peak bytes beside them": beside,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }


def all_distances(features: Tensor) -> Tensor:
    """Return the outliers of one class from the distances of all its candidates."""
    boundary = kth_distance(features, features, 50).topk(50).indices
    noise = 0.1 * torch.randn(600, features.shape[1])
    candidates = (features[boundary, None] + noise).flatten(0, 1)
    return candidates[kth_distance(candidates, features, 50).topk(40).indices]


def table(rows: list[dict[str, Any]], part: str) -> Table:
    """A line for each form, over the floor in time and operations."""
    shown = Table(part, title=f"{part}, over {rows[0][part]['floor']}")
    for row in rows:
        for what in ("seconds", "time", "operations", "peak, MiB"):
            shown.add_column(f"{row['library']}: {what}", justify="right")
    for name in rows[0][part]["seconds"]:
        cells = []
        for found in (row[part] for row in rows):
            cells.append(f"{found['seconds'][name]['median']:.2f}")
            cells += [f"{found[over][name]:.2f}" for over in ("over floor", "flops over floor")]
            cells.append(f"{found['peak bytes'][name] / 2**20:,.0f}")
        shown.add_row(name, *cells)
    return shown


def targets(rows: list[dict[str, Any]], outliers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is to be reached, and whether it is."""
    found = []
    for row in rows:
        for part, most in TARGETS.items():
            value = row[part]["over floor"]["OnePrompt"]
            target = f"OnePrompt's {part} over {row[part]['floor']} ≤ {most}"
            met = value <= most
            found.append({"of": row["library"], "target": target, "measured": value, "met": met})
    seconds = outliers["seconds"]["boundary"]["median"]
    target = f"seconds of virtual outliers ≤ {OUTLIER_SECONDS}"
    met = seconds <= OUTLIER_SECONDS
    return [*found, {"of": "outliers", "target": target, "measured": seconds, "met": met}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow model, for a look")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.0, help="at the least, for each table")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    outliers = measure_outliers(options)
    rows = [measure_library(library, options) for library in LIBRARIES]
    console = Console(width=160)
    for part in TARGETS:
        console.print(table(rows, part))
    beside = outliers["peak bytes beside them"]["boundary"] / 2**20
    for name, of_form in outliers["seconds"].items():
        console.print(f"outliers, {name}: {of_form['median']:.2f} s")
    console.print(f"outliers: {beside:,.1f} MiB beside the features at the peak")
    judged = targets(rows, outliers)
    for target in judged:
        verdict = "met" if target["met"] else "missed"
        console.print(f"{target['of']}: {target['target']}: {target['measured']:.2f}, {verdict}")
    settings = {"seed": SEED, "rounds": options.rounds, "batch": options.batch}
    write_json(
        options.json,
        {
            "settings": {**settings, "narrow": options.quick, "load_average": os.getloadavg()[0]},
            "memory": memory_method("cpu"),
            "environment": environment("cpu", PACKAGES),
            "models": rows,
            "outliers": outliers,
            "targets": judged,
        },
    )


if __name__ == "__main__":
    main()
