"""FLoRA on every convolution of a real CNN against LoRA: what they learn, what they forget.

    python examples/cnn_flora.py
    python examples/cnn_flora.py --methods flora lora --seeds 0 --max_steps 40

An EfficientNet-Lite0 that was trained on ImageNet learns to read handwritten digits from a few
pictures of each. It gets a new head of ten outputs; ImageNet's head is put aside, and afterwards
tells, on top of the adapted convolutions, what is left of ImageNet: crops of photographs are
classified by the network as it was and as it is. The methods:

- `head`: the new head alone; the convolutions stay as they were;
- `flora`: FLoRA on all 49 convolutions, the 16 depthwise ones included;
- `lora`: PEFT's LoRA on the 33 that are not depthwise (on depthwise ones its rank would have to be
  a multiple of the channels), of the rank that trains the closest number of parameters;
- `full`: all convolutions themselves;
- `flora + distillation`, `lora + distillation`: with `graftune.FrozenDistillation` of the features
  that enter the head, towards those of the network with its adapter off.

Batch normalisation stays as pretrained. Results are written after each run, and a run that is there
is not made again. Every option of `transformers.TrainingArguments` is accepted as well.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HfArgumentParser, TrainingArguments

import graftune
from embedded.digits import digits_task, photograph_crops
from embedded.efficientnet import load_efficientnet, transform
from embedded.results import Results, console, table
from graftune.integrations.data import ImageCollator, pixels

# Learning rate and weight of the distillation, chosen on the validation split for accuracy; with
# distillation among those that keep three quarters of ImageNet's answers:
# --split validation --seeds 10 --rates 1e-3 3e-3 1e-2 --weights 0.1 0.3 1 3 10
METHODS = {
    "head": (3e-3, 0.0),
    "flora": (1e-2, 0.0),
    "lora": (1e-2, 0.0),
    "full": (3e-4, 0.0),
    "flora + distillation": (1e-2, 0.1),
    "lora + distillation": (3e-3, 0.1),
}
COLUMNS = {
    "trained": ",.0f",
    "accuracy": ".1f",
    "ImageNet top-1 kept": ".1f",
    "ImageNet KL": ".3f",
    "seconds": ".0f",
}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What to compare, on what."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Which of {', '.join(METHODS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each chooses the digits and all else by chance."},
    )
    rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates; by default each method has its own."},
    )
    weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Weights of the distillation; by default each method has its own."},
    )
    split: str = option("test", "Which digits to ask about: test, or validation to choose rates.")
    shots: int = option(16, "Training pictures of each digit.")
    rank: int = option(6, "FLoRA's rank; LoRA's follows from it.")
    size: int = option(64, "Pixels a side of the digits.")
    crops: int = option(300, "Crops of photographs.")
    results: str = option("outputs/cnn_flora/results.json", "Where the results are kept.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with defaults for this task."""

    output_dir: str = option("outputs/cnn_flora", "Where the trainer may write.")
    max_steps: int = 150
    per_device_train_batch_size: int = 20
    per_device_eval_batch_size: int = 100
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_strategy: str = "no"
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


def convolutions(network: nn.Module, depthwise: bool) -> list[str]:
    """Return the names of the convolutions, with the depthwise ones or without."""
    found = ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    return [name for name, module in found if depthwise or module.groups == 1]


def attach(network: Any, method: str, rank: int) -> Any:
    """Return the network with what a method trains beside the head; the rank is an adapter's."""
    common = {"r": rank, "modules_to_save": ["classifier"]}
    if method == "flora":
        targets = convolutions(network, depthwise=True)
        # The scale that the paper's authors use on convolutions.
        return graftune.wrap(network, "flora", target_modules=targets, scale=4.0, **common)
    if method == "lora":
        targets = convolutions(network, depthwise=False)
        return graftune.wrap(network, LoraConfig(target_modules=targets, **common))
    trained = {"classifier", *(convolutions(network, True) if method == "full" else [])}
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name.rpartition(".")[0] in trained
    return network


def trained_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def new_network() -> tuple[Any, nn.Module]:
    """Return the pretrained network with a new head of ten outputs, and ImageNet's head."""
    network = copy.deepcopy(pretrained())
    imagenet = network.classifier
    network.reset_classifier(10)
    return network, imagenet


pretrained = cache(load_efficientnet)


def closest_lora_rank(rank: int) -> int:
    """Return the rank at which LoRA trains the closest number of parameters to FLoRA's."""
    head, flora, lora = (
        trained_parameters(attach(new_network()[0], method, r))
        for method, r in (("head", 1), ("flora", rank), ("lora", 1))
    )
    return max(1, round((flora - head) / (lora - head)))


@torch.no_grad()
def imagenet_outputs(model: nn.Module, imagenet: nn.Module, crops: Tensor) -> Tensor:
    """Return log-probabilities of ImageNet's classes by ImageNet's own head: (N, 1000)."""
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(network.eval().parameters()).device
    found = []
    for batch in crops.split(50):
        features = network.forward_features(batch.to(device))
        logits = imagenet.to(device)(network.forward_head(features, pre_logits=True))
        found.append(F.log_softmax(logits, dim=-1).cpu())
    return torch.cat(found)


def forgotten(before: Tensor, after: Tensor) -> dict[str, float]:
    """Compare log-probabilities (N, C): share of equal answers, and KL(before ‖ after) in nats."""
    kept = (before.argmax(-1) == after.argmax(-1)).double().mean().item()
    divergence = F.kl_div(after, before, reduction="batchmean", log_target=True).item()
    return {"ImageNet top-1 kept": 100 * kept, "ImageNet KL": divergence}


@dataclass
class Comparison:
    """What all runs have in common."""

    options: Options
    args: TrainingArguments

    def __post_init__(self) -> None:
        pictures = photograph_crops(self.options.crops)
        self.crops = pixels(pictures, transform())  # (N, 3, 224, 224)
        self.before = imagenet_outputs(*new_network(), self.crops)
        lora = closest_lora_rank(self.options.rank)
        self.ranks = {"flora": self.options.rank, "lora": lora}

    def run(self, method: str, rate: float, weight: float, seed: int) -> dict[str, Any]:
        """Train by one method, and return what it gained and what it forgot."""
        transformers.set_seed(seed)
        task = digits_task(seed, self.options.shots)
        network, imagenet = new_network()
        adapter, _, _ = method.partition(" + ")
        rank = self.ranks.get(adapter)
        model = attach(network, adapter, rank or 1)
        trainer = graftune.Trainer(
            model,
            dataclasses.replace(self.args, seed=seed, learning_rate=rate),
            objective=graftune.ImageClassifier(),
            regularizers=[graftune.FrozenDistillation(weight, of="features")] if weight else [],
            train_dataset=task.train,
            eval_dataset=getattr(task, self.options.split),
            data_collator=ImageCollator(transform(self.options.size)),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy = 100 * trainer.evaluate()["eval_accuracy"]
        after = imagenet_outputs(model, imagenet, self.crops)
        return {
            "method": method,
            "rank": rank,
            "rate": rate,
            "weight": weight,
            "seed": seed,
            "trained": trained_parameters(model),
            "accuracy": accuracy,
            **forgotten(self.before, after),
            "seconds": seconds,
        }


def settings_to_try(options: Options, method: str) -> Iterator[tuple[float, float]]:
    """Yield the learning rates and weights of the distillation to train a method with."""
    rate, weight = METHODS[method]
    yield from product(
        options.rates or [rate], options.weights if weight and options.weights else [weight]
    )


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    say = console().print
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    common = ("split", "shots", "rank", "size", "crops")
    settings = {name: getattr(options, name) for name in common}
    settings |= {"steps": args.max_steps, "batch": args.per_device_train_batch_size}
    results = Results(Path(options.results), settings)
    comparison = Comparison(options, args)
    for seed, method in product(options.seeds, options.methods):
        for rate, weight in settings_to_try(options, method):
            if not results.has(method=method, rate=rate, weight=weight, seed=seed):
                results.add(comparison.run(method, rate, weight, seed))
                say(results.rows[-1])
    title = f"{options.shots} of each digit, {args.max_steps} steps; {options.split} split, in %"
    say(table(title, results.rows, ("method", "rank", "rate", "weight"), COLUMNS))
    say(f"Written to {options.results}")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.utils.logging.disable_progress_bar()
    main()
