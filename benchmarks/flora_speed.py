"""How fast FLoRA's layers are, and how much memory they take, against four other forms.

    python benchmarks/flora_speed.py            # a few minutes on two cores
    python benchmarks/flora_speed.py --quick    # seconds

A step is a forward and a backward that also gives the input's gradient, as inside a network. The
forms run in turns, and what is compared are medians of one run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flora_forms import Form, Layer, flora_and_dense, frozen, locon, lora, merged
from flora_report import TITLES, judge, memory_table, time_table, verdict_line
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
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "flora_speed.json"
PACKAGES = ("graftune", "torch", "peft", "lycoris-lora", "transformers")


@dataclass(frozen=True)
class Case:
    """One layer, its input and the ranks it is adapted with."""

    name: str
    kind: str  # "conv" or "linear"
    in_size: int
    out_size: int
    ranks: tuple[int, ...]
    input_shape: tuple[int, ...]
    quick: bool = False

    def layer(self) -> Layer:
        """Return the layer, at random."""
        if self.kind == "conv":
            return nn.Conv2d(self.in_size, self.out_size, 3, padding=1)
        return nn.Linear(self.in_size, self.out_size)


def _conv(channels: int, size: int, quick: bool = False) -> Case:
    # Ranks of the authors' own example for convolutions.
    shape = (1, channels, size, size)
    return Case(f"unet-{channels}", "conv", channels, channels, (16, 16, 2, 2), shape, quick)


def _linear(family: str, in_size: int, out_size: int, rows: Sequence[int], quick=False) -> Case:
    name = f"{family}-{in_size}-{out_size}"
    return Case(name, "linear", in_size, out_size, (16, 16), (*rows, in_size), quick)


CASES = (
    _conv(320, 64),
    _conv(640, 32, quick=True),
    _conv(1280, 16),
    _linear("vit", 768, 768, (8, 197), quick=True),
    _linear("vit", 768, 3072, (8, 197)),
    _linear("vit", 3072, 768, (8, 197)),
    _linear("llm", 2048, 2048, (1, 256), quick=True),
    _linear("llm", 2048, 8192, (1, 256)),
    _linear("llm", 8192, 2048, (1, 256)),
)
# To see that the script works; what is measured on such small layers is mostly overhead.
SMALL = (
    Case("small-conv", "conv", 64, 64, (16, 16, 2, 2), (1, 64, 16, 16)),
    Case("small-linear", "linear", 256, 256, (16, 16), (4, 8, 256)),
)


def training_step(form: Form, x: Tensor, gradient: Tensor) -> Step:
    """Return a step that runs forward and the gradients of the input and of what is trained."""

    def step() -> None:
        form.run(x).backward(gradient)
        for tensor in (x, *form.parameters):
            tensor.grad = None  # adding to an old gradient is not what is measured

    return step


def inference_step(form: Form, x: Tensor) -> Step:
    """Return a step that runs forward without gradients."""

    def step() -> Tensor:
        with torch.inference_mode():
            return form.run(x)

    return step


def training_forms(case: Case, base: Layer) -> dict[str, Form]:
    """Return FLoRA's layer and what it is compared with."""
    flora, dense = flora_and_dense(base, case.ranks)
    forms = {
        "frozen": frozen(base),
        "flora": flora,
        "lora": lora(base, flora.count),
        "dense": dense,
        "lycoris": locon(base, flora.count, bypass=True),
    }
    if case.kind == "conv":  # for a linear layer there is nothing in Tucker form
        forms["lycoris_default"] = locon(base, flora.count, bypass=False)
    return forms


def measure_training(case: Case, base: Layer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one training step of every form of a case."""
    forms = training_forms(case, base)
    x = torch.randn(case.input_shape, device=options.device).requires_grad_()
    with torch.no_grad():
        expected, actual = forms["dense"].run(x), forms["flora"].run(x)
        error = float((actual - expected).abs().max() / expected.abs().max())
    gradient = torch.randn_like(expected)
    steps = {name: training_step(form, x, gradient) for name, form in forms.items()}
    seconds = interleaved(steps, options.repeats, options.warmup, options.seconds, options.device)
    operations = {name: flops(step) for name, step in steps.items()}
    forward = operations["frozen"] / 2  # forward and input gradient cost the same
    memory = {name: peak_bytes(step, options.device) for name, step in steps.items()}
    others = [name for name in TITLES if name in forms]
    return {
        "parameters": {name: form.count for name, form in forms.items()},
        "relative_error_to_dense": error,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time_ratios": {
            f"flora / {name}": ratio(seconds["flora"], seconds[name]) for name in others
        }
        | {"dense / flora": ratio(seconds["dense"], seconds["flora"])},
        "peak_bytes": memory,
        "memory_ratios": {f"flora / {name}": memory["flora"] / memory[name] for name in others},
        "flops_over_frozen_forward": {name: n / forward for name, n in operations.items()},
    }


def measure_inference(case: Case, base: Layer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure inference of the base layer, twice to show the noise, and of merged FLoRA."""
    in_place, unloaded = merged(base, case.ranks)
    forms = {
        "base": frozen(base),
        "base_again": frozen(base),
        "merged_in_place": in_place,
        "merged": unloaded,
    }
    x = torch.randn(case.input_shape, device=options.device)
    steps = {name: inference_step(form, x) for name, form in forms.items()}
    seconds = interleaved(
        steps, 2 * options.repeats, options.warmup, options.seconds / 3, options.device
    )
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time_ratios": {
            f"{name} / base": ratio(seconds[name], seconds["base"])
            for name in ("merged", "merged_in_place", "base_again")
        },
    }


def measure_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything about one case."""
    torch.manual_seed(options.seed)
    base = case.layer().to(options.device)
    return {
        **asdict(case),
        "training": measure_training(case, base, options),
        "inference": measure_inference(case, base, options),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case a family, few repeats")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in (*CASES, *SMALL)])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, help="timed rounds at the fewest (7; quick 3)")
    parser.add_argument("--seconds", type=float, help="time a case for so long (12; quick 1)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args(arguments)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 7
    if options.seconds is None:
        options.seconds = 1.0 if options.quick else 12.0
    return options


def main() -> None:
    """Measure, print the table and the targets, and write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    console = Console(width=max(Console().width, 100))  # a narrower table loses its numbers
    chosen = [case for case in CASES if case.quick or not options.quick]
    if options.cases:
        chosen = [case for case in (*CASES, *SMALL) if case.name in options.cases]
    load, cases = os.getloadavg()[0], []
    for case in chosen:
        with console.status(f"measuring {case.name}"):
            cases.append(measure_case(case, options))
    verdicts = [verdict for case in cases for verdict in judge(case)]
    result = {
        "benchmark": "flora_speed",
        "settings": {k: v for k, v in vars(options).items() if k != "json"} | {"dtype": "float32"},
        "load_average": {"start": load, "end": os.getloadavg()[0]},
        "environment": environment(options.device, PACKAGES),
        "memory": memory_method(options.device),
        "cases": cases,
        "targets": verdicts,
    }
    write_json(options.json, result)
    console.print(time_table(cases))
    console.print(memory_table(cases))
    for verdict in verdicts:
        console.print(verdict_line(verdict), highlight=False)
    console.print(
        f"threads: {options.threads}, rounds: {options.repeats} or more, device: {options.device}"
    )
    console.print(f"memory: {result['memory']}")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
