"""How fast masked layers and gradient dropout are, and how much memory they take.

    python benchmarks/mask_speed.py            # a few minutes on two cores
    python benchmarks/mask_speed.py --quick    # seconds, on small layers

Layers: a step is a forward and a backward that also gives the input's gradient. Forms, timed in
turns, each on its own copy of the layer:

- **dense**: the layer itself with a trained weight. A mask's gradient is a dense weight gradient,
  so this is the floor;
- **masked**: the layer with a mask;
- **recompute**: the same, with the masked weight computed again in the backward pass.

Inference, without gradients: the **base** layer (twice, for the noise), the layer with its mask as
it is **evaluated**, **merged** into it, and with its adapter **disabled**.

Gradient dropout: a whole step on a ViT-B/16 with masks on its attention, against its parts by hand:
one forward, two backward passes of it, and one forward of the frozen model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import (
    Step,
    environment,
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
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import graftune
from graftune.adapters.base.frozen import frozen_base

RESULTS = Path(__file__).parent / "results" / "mask_speed.json"
INFERENCE = ("base again", "evaluated", "merged", "disabled")
NOISE = 0.02  # beside that of the base layer over itself
TARGETS = {"masked / dense": 1.15, "gradient dropout / its parts": 1.10}


@dataclass(frozen=True)
class Case:
    """A layer to mask, and the shape of its input."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = (
    Case("vit-768-768", lambda: nn.Linear(768, 768), (8, 197, 768)),
    Case("vit-768-3072", lambda: nn.Linear(768, 3072), (8, 197, 768)),
    Case("vit-3072-768", lambda: nn.Linear(3072, 768), (8, 197, 3072)),
    Case("patches", lambda: nn.Conv2d(3, 768, 16, 16), (8, 3, 224, 224)),
    Case("resnet-256", lambda: nn.Conv2d(256, 256, 3, padding=1), (8, 256, 14, 14)),
    Case("unet-640", lambda: nn.Conv2d(640, 640, 3, padding=1), (1, 640, 32, 32)),
    Case("llm-2048-2048", lambda: nn.Linear(2048, 2048), (4, 256, 2048)),
)
SMALL = (
    Case("small-linear", lambda: nn.Linear(64, 64), (4, 8, 64)),
    Case("small-conv", lambda: nn.Conv2d(8, 8, 3), (2, 8, 12, 12)),
)


def masked(base: nn.Module, **options: Any) -> nn.Module:
    """Return a copy of a layer under a mask of which some entries are off."""
    network = nn.Sequential(copy.deepcopy(base))
    targets = {"target_modules": ["0"], "init_weights": False}
    return graftune.wrap(network, "mask_tuning", regularizers=[], **targets, **options)


def training_step(module: nn.Module, x: Tensor) -> Step:
    """Return a step of forward and backward with the input's gradient."""
    trained = [p for p in module.parameters() if p.requires_grad]
    gradient = torch.randn_like(module(x))

    def step() -> None:
        module(x).backward(gradient)
        for tensor in (x, *trained):
            tensor.grad = None  # adding to an old gradient is not what is measured

    return step


def inference_step(module: nn.Module, x: Tensor) -> Step:
    """Return a step of forward without gradients."""

    def step() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return step


def disabled_step(model: Any, x: Tensor) -> Step:
    """Return a step of forward without gradients, with the adapter off."""

    def step() -> Tensor:
        with torch.inference_mode(), model.disable_adapter():
            return model(x)

    return step


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Return how many bytes autograd keeps for the backward pass, weights and input apart."""
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(kept.values())


def measure_layer(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the forms of one layer."""
    base = case.build().to(options.device)
    x = torch.randn(case.shape, device=options.device).requires_grad_()
    training = {
        "dense": copy.deepcopy(base),
        "masked": masked(base),
        "recompute": masked(base, recompute=True),
    }
    training["dense"].requires_grad_(True)
    steps = {name: training_step(module, x) for name, module in training.items()}
    seconds = interleaved(steps, options.repeats, 1, options.seconds, options.device)
    model: Any = masked(base)
    inference = {
        "base": inference_step(base, x),
        "base again": inference_step(copy.deepcopy(base), x),
        "evaluated": inference_step(masked(base).eval(), x),
        "merged": inference_step(masked(base).merge_and_unload(), x),
        "disabled": disabled_step(model, x),
    }
    without = interleaved(inference, options.repeats, 1, options.seconds, options.device)
    return {
        "case": case.name,
        "weight bytes": base.weight.numel() * base.weight.element_size(),
        "seconds": {name: summary(values) for name, values in (seconds | without).items()},
        "masked / dense": ratio(seconds["masked"], seconds["dense"]),
        "recompute / dense": ratio(seconds["recompute"], seconds["dense"]),
        **{f"{n} / base": ratio(without[n], without["base"]) for n in inference if n != "base"},
        "peak bytes": {name: peak_bytes(step, options.device) for name, step in steps.items()},
        "kept bytes": {name: kept_bytes(module, x) for name, module in training.items()},
    }


def vit(small: bool) -> nn.Module:
    """A ViT-B/16 with random weights, or a small one."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = ViTConfig(num_labels=100, **(sizes if small else {}))
    return ViTForImageClassification(config)


def divergence(logits: Tensor, frozen: Tensor) -> Tensor:
    """KL(frozen ‖ adapted), the mean over a batch."""
    return F.kl_div(
        logits.log_softmax(-1), frozen.log_softmax(-1), reduction="batchmean", log_target=True
    )


def dropout_steps(options: argparse.Namespace) -> dict[str, Step]:
    """Return a step with gradient dropout, and its parts by hand, on one model."""
    torch.manual_seed(0)
    base = vit(options.quick).to(options.device)
    model = graftune.wrap(base, "mask_tuning", targets="attention", regularizers=[]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    pixels = torch.randn(options.batch, 3, 224, 224, device=options.device)
    batch = {"pixel_values": pixels, "labels": torch.arange(options.batch, device=options.device)}
    objective = graftune.ImageClassifier()
    regularization = graftune.Regularization(model, [graftune.GradientDropout(1.0)])
    regularization.start(steps=1000, epochs=1)

    def whole() -> None:
        regularization(objective, model, batch)["loss"].backward()
        regularization.transform_gradients()
        model.zero_grad()

    def parts() -> None:
        output = objective(model, **batch)
        with torch.no_grad(), frozen_base(model):
            frozen = objective(model, **batch)["logits"]
        torch.autograd.grad(divergence(output["logits"], frozen), trained, retain_graph=True)
        torch.autograd.grad(output["loss"], trained)

    return {"gradient dropout": whole, "its parts": parts}


def measure_dropout(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step with gradient dropout against its parts."""
    steps = dropout_steps(options)
    seconds = interleaved(steps, options.repeats, 1, options.seconds, options.device)
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "gradient dropout / its parts": ratio(seconds["gradient dropout"], seconds["its parts"]),
        "peak bytes": {name: peak_bytes(step, options.device) for name, step in steps.items()},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a layer."""
    ratios = ("masked / dense", "recompute / dense", *(f"{name} / base" for name in INFERENCE))
    shown = Table("layer", *ratios, "W, MiB", "kept, MiB", "kept, recompute")
    for row in rows:
        kept = row["kept bytes"]
        shown.add_row(
            row["case"],
            *(f"{row[name]:.2f}" for name in ratios),
            *(f"{n / 2**20:.1f}" for n in (row["weight bytes"], kept["masked"], kept["recompute"])),
        )
    return shown


def verdicts(rows: list[dict[str, Any]], dropout: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, met or missed by how much."""
    found = []
    for name, most in TARGETS.items():
        measured = [(row["case"], row[name]) for row in rows if name in row]
        measured += [("vit", dropout[name])] if name in dropout else []
        found += [
            {"case": case, "target": f"{name} ≤ {most}", "value": value, "met": value <= most}
            for case, value in measured
        ]
    for row in rows:
        most = max(1.0, row["base again / base"]) + NOISE
        for name in ("evaluated / base", "merged / base"):
            target = {"case": row["case"], "target": f"{name} = 1", "value": row[name]}
            found.append({**target, "met": row[name] <= most})
        kept = row["kept bytes"]["recompute"]
        target = {"case": row["case"], "target": "recompute keeps no copy of W", "value": kept}
        found.append({**target, "met": kept < row["weight bytes"] / 8})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small layers, for a look")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="at the least, for each layer")
    parser.add_argument("--batch", type=int, default=8, help="pictures for gradient dropout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [measure_layer(case, options) for case in (SMALL if options.quick else CASES)]
    dropout = measure_dropout(options)
    targets = verdicts(rows, dropout)
    console = Console(width=140)
    console.print(table(rows))
    for target in targets:
        verdict = "met" if target["met"] else "missed"
        console.print(f"{target['case']}: {target['target']}: {target['value']:.2f}, {verdict}")
    packages = ("graftune", "torch", "peft", "transformers")
    write_json(
        options.json,
        {
            "settings": {"repeats": options.repeats, "seconds": options.seconds, "seed": 0},
            "memory": memory_method(options.device),
            "environment": environment(options.device, packages),
            "layers": rows,
            "gradient dropout": dropout,
            "targets": targets,
        },
    )


if __name__ == "__main__":
    main()
