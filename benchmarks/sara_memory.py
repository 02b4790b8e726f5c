"""How much memory SaRA's training takes, and how long its steps are, on U-Nets of SD's shape.

    python benchmarks/sara_memory.py      # SD 1.5 itself on CUDA, parts of its width on a CPU
    python benchmarks/sara_memory.py --size tiny --time-size tiny     # seconds, for a look

Memory: a whole training step (forward, backward, AdamW; float32, with the input's gradient), each
form in a process of its own. Forms:

- **frozen**: no trained weights, no optimizer: forward and backward to the input;
- **full**: every weight;
- **SaRA** at 5, 10 and 20 % of the weights;
- **LoRA**: PEFT's, on all linear layers and convolutions, and **SHiRA**: PEFT's, on linear layers,
  the only ones it has; both with as many trained numbers as SaRA.

Counted are the tensors that stay (weights, trained values, places, optimizer state, and on a CPU
the workspaces that are used again), the gradients after backward, and what autograd keeps at the
end of forward (activations). *Original values* are the base model's, which SaRA keeps beside a
weight that holds trained values. Measured is the peak of one step; *other* is what it is above the
larger of activations and gradients, which do not exist in full at the same time: the rest of the
smaller one, and temporaries. On a CPU the peak of the process's resident memory above that before
the model was built stands beside it.

Time: forward and backward, in turns in one process, over those of full fine-tuning: the U-Net at
several batches, and single layers at several numbers of positions.

To reach: time at most 1.10 × that of full fine-tuning; memory above the frozen step at most 24
bytes an entry and one block of a layer's gradient. A frozen step keeps no inputs of linear layers,
and no weight of one is trained without them: that part of the difference is said apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sara_forms as forms
import torch
from measure import (
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
from torch import nn

from graftune.adapters.sara.places import BLOCK, WHOLE
from graftune.adapters.sara.workspace import held

RESULT = Path(__file__).parent / "results" / "sara_memory.json"
TIME_TARGET, ENTRY_TARGET = 1.10, 24
PACKAGES = ["graftune", "torch", "peft", "diffusers"]
BLOCK_BYTES = 4 * WHOLE * BLOCK  # of the largest dense gradient that there is at a time
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[int, ...]]]] = {
    "linear 1280 → 1280": (lambda: nn.Linear(1280, 1280), lambda side: (side * side, 1280)),
    "linear 1280 → 10240": (lambda: nn.Linear(1280, 10240), lambda side: (side * side, 1280)),
    "convolution 1280 → 1280": (
        lambda: nn.Conv2d(1280, 1280, 3, padding=1),
        lambda side: (1, 1280, side, side),
    ),
}
STAY = ("weights", "trained values", "places", "original values", "workspace", "optimizer state")
PARTS = ("memory", "unet", "layers")
SIDES = (8, 16, 32)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# Memory, in a process of its own.


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Count and measure what one form's training step takes."""
    before = _resident()
    base = forms.unet(args.size, args.device)
    weights = forms.nbytes(base.parameters())
    if args.checkpointed:
        base.enable_gradient_checkpointing()
    entries = int(args.share * forms.count(base.parameters()))
    model = forms.adapted(base, args.form, entries)
    inputs = forms.batch(args.size, args.batch, args.side, args.device)
    trained = forms.trained(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    found: dict[str, Any] = {}

    def step() -> None:
        forms.loss(model, inputs).backward()
        found["gradients"] = forms.nbytes(p.grad for p in trained)
        if optimizer is not None:
            optimizer.step()
        for tensor in (inputs["sample"], *trained):
            tensor.grad = None

    step()
    _forget_peak()
    step()
    resident = _resident(peak=True)
    peak = peak_bytes(step, args.device)
    states = optimizer.state.values() if optimizer else ()
    own = forms.nbytes(model.parameters()) - weights
    counted = {
        "weights": weights,
        "trained values": own,
        "places": forms.places_bytes(model),
        "original values": forms.original_values_bytes(model),
        "workspace": held(),
        "optimizer state": forms.nbytes(t for state in states for t in state.values()),
        "gradients": found["gradients"],
        "activations": forms.kept(model, inputs),
    }
    counted["other"] = peak - max(counted["gradients"], counted["activations"])
    return {
        "trained": forms.count(trained),
        "bytes": counted,
        "peak of a step": peak,
        "peak": sum(counted[name] for name in STAY) + peak,
        "resident": None if resident is None or before is None else resident - before,
    }


def _resident(peak: bool = False) -> int | None:
    """Bytes of memory that the process holds, or has held at most; None where it is not told."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _forget_peak() -> None:
    """Let the kernel count the most resident memory from now on."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")


def memory_row(args: argparse.Namespace, form: str, share: float, checkpointed: bool) -> Any:
    """Measure one form in a fresh process."""
    options = ["size", "batch", "side", "device", "threads"]
    command = [sys.executable, __file__, "--form", form, "--share", str(share)]
    command += [f"--{name}={getattr(args, name)}" for name in options]
    command += ["--checkpointed"] if checkpointed else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{form} at {share}: {done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    return {"form": form, "share": share, "checkpointed": checkpointed, **row}


# Time, in turns.


def time_of_unet(args: argparse.Namespace, batch: int, side: int) -> dict[str, Any]:
    """Time forward and backward of all forms, each on a copy of the same weights."""
    base = forms.unet(args.time_size, args.device)
    numbers = forms.count(base.parameters())
    models = {"full": base}
    for share in args.shares:
        models[f"SaRA {share:.0%}"] = forms.adapted(
            copy.deepcopy(base), "SaRA", int(share * numbers)
        )
    for form in ("frozen", "LoRA", "SHiRA"):
        copied = copy.deepcopy(base)
        models[form] = forms.adapted(
            copied, form, int(args.shares[len(args.shares) // 2] * numbers)
        )
    steps = {
        name: forms.forward_backward(model, forms.batch(args.time_size, batch, side, args.device))
        for name, model in models.items()
    }
    return {"size": args.time_size, "batch": batch, "side": side, **_timed(steps, args)}


def time_of_layer(args: argparse.Namespace, name: str, side: int) -> dict[str, Any]:
    """Time forward and backward of one layer at a number of positions."""
    make, shape = LAYERS[name]
    torch.manual_seed(forms.SEED)
    base = nn.Sequential(make()).to(args.device)
    x = torch.randn(shape(side), device=args.device).requires_grad_()
    gradient = torch.randn_like(base(x))
    models = {"full": base}
    for share in args.shares:
        entries = int(share * forms.count(base.parameters()))
        models[f"SaRA {share:.0%}"] = forms.adapted(copy.deepcopy(base), "SaRA", entries)

    def step(model: nn.Module) -> None:
        model(x).backward(gradient)
        for tensor in (x, *model.parameters()):
            tensor.grad = None

    steps = {n: lambda model=model: step(model) for n, model in models.items()}
    return {"layer": name, "positions": side * side, **_timed(steps, args)}


def _timed(steps: Any, args: argparse.Namespace) -> dict[str, Any]:
    clock = CLOCKS[args.clock]
    seconds = interleaved(steps, args.rounds, 1, args.seconds, args.device, clock)
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "over full": {n: ratio(seconds[n], seconds["full"]) for n in seconds if n != "full"},
    }


# Results.


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be reached, and whether it is."""
    found = []
    for row in result["unet"] + result["layers"]:
        found += [
            {
                "case": f"{name}, {_where(row)}",
                "target": f"time over full ≤ {TIME_TARGET}",
                "measured": value,
                "met": value <= TIME_TARGET,
            }
            for name, value in row["over full"].items()
            if name.startswith("SaRA")
        ]
    return found + [target for row in result["memory"] for target in _judged_memory(row, result)]


def _judged_memory(row: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    if row["form"] != "SaRA":
        return []
    above = above_frozen(row, result["memory"])
    case = f"SaRA {row['share']:.0%}{', checkpointed' if row['checkpointed'] else ''}"
    most = ENTRY_TARGET * row["trained"] + BLOCK_BYTES
    name = f"bytes above the frozen step ≤ {ENTRY_TARGET} an entry + {BLOCK_BYTES}"
    found = []
    for what, value in (("", above["all"]), (", inputs of layers apart", above["inputs apart"])):
        target = {"case": case, "target": name + what, "measured": value, "most": most}
        found.append({**target, "an entry": value / row["trained"], "met": value <= most})
    return found


def above_frozen(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, int]:
    """How much more a form's peak is than the frozen model's, with kept inputs and without."""
    alike = (r for r in rows if r["checkpointed"] == row["checkpointed"])
    frozen = next(r for r in alike if r["form"] == "frozen")
    inputs = row["bytes"]["activations"] - frozen["bytes"]["activations"]
    more = row["peak"] - frozen["peak"]
    return {"all": more, "inputs apart": more - inputs}


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """One line a form, in MiB."""
    names = list(rows[0]["bytes"])
    shown = Table("form", "trained", *names, "peak", "above frozen", "resident")
    for row in rows:
        mib = [*row["bytes"].values(), row["peak"], above_frozen(row, rows)["all"]]
        mib += [] if row["resident"] is None else [row["resident"]]
        share = "" if row["form"] in ("frozen", "full") else f" {row['share']:.0%}"
        shown.add_row(
            f"{row['form']}{share}{', checkpointed' if row['checkpointed'] else ''}",
            f"{row['trained']:,}",
            *(f"{n / 2**20:,.1f}" for n in mib),
        )
    return shown


def time_table(rows: list[dict[str, Any]]) -> Table:
    """One line a case: seconds of full fine-tuning, and the others over it."""
    names = list(rows[0]["over full"])
    shown = Table("case", "full, s", *(f"{name} / full" for name in names))
    for row in rows:
        ratios = (f"{row['over full'][name]:.2f}" for name in names)
        shown.add_row(_where(row), f"{row['seconds']['full']['median']:.4f}", *ratios)
    return shown


def _where(row: dict[str, Any]) -> str:
    if "layer" in row:
        return f"{row['layer']}, {row['positions']} positions"
    return f"{row['size']} U-Net, {row['batch']} of {row['side']}²"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all there is, and write the result after each row; go on where it was left off."""
    names = ("size", "time_size", "shares", "shapes", "batch", "side", "clock", "threads")
    settings = {name: getattr(args, name) for name in names}
    settings = json.loads(json.dumps({**settings, "seed": forms.SEED, "rounds": args.rounds}))
    result: dict[str, Any] = {"settings": settings, "memory": [], "unet": [], "layers": []}
    if args.json.exists() and args.resume:
        earlier = json.loads(args.json.read_text(encoding="utf-8"))
        if earlier["settings"] == settings:
            result = earlier
    result["memory method"] = memory_method(args.device)
    for part, key, make in _rows(args):
        if not any(key.items() <= row.items() for row in result[part]):
            result[part].append(make())
            result["environment"] = environment(args.device, PACKAGES)
            write_json(args.json, result)
            print(part, key, "done", flush=True)
    return result


def _rows(args: argparse.Namespace) -> Any:
    """Yield every row's part of the result, what tells it from others, and what measures it."""
    wanted = [("frozen", 0.0, False), ("full", 0.0, False)]
    wanted += [(form, share, False) for share in args.shares for form in forms.FORMS[2:]]
    wanted += [("frozen", 0.0, True), *(("SaRA", share, True) for share in args.shares)]
    for form, share, checkpointed in wanted if "memory" in args.parts else ():
        key = {"form": form, "share": share, "checkpointed": checkpointed}
        yield "memory", key, lambda key=key: memory_row(args, **key)
    for batch, side in args.shapes if "unet" in args.parts else ():
        key = {"size": args.time_size, "batch": batch, "side": side}
        yield "unet", key, lambda of=(batch, side): time_of_unet(args, *of)
    for name in LAYERS if "layers" in args.parts else ():
        for side in SIDES:
            key = {"layer": name, "positions": side * side}
            yield "layers", key, lambda name=name, side=side: time_of_layer(args, name, side)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = "sd15" if device == "cuda" else "medium"
    parser.add_argument("--size", choices=forms.SIZES, default=size, help="for memory")
    time_size = "sd15" if device == "cuda" else "small"
    parser.add_argument("--time-size", choices=forms.SIZES, default=time_size)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--batch", type=int, default=1, help="of the memory measurements")
    parser.add_argument("--side", type=int, default=32, help="of their latents")
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=[(1, 32), (4, 32), (1, 64), (4, 64)]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="at the least, for each case")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the process's own time, for one thread on a machine that others use, too",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default=device)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    alone = parser.add_argument_group("what the script calls itself with")
    alone.add_argument("--form", choices=forms.FORMS)
    alone.add_argument("--share", type=float)
    alone.add_argument("--checkpointed", action="store_true")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    batch, side = text.split("x")
    return int(batch), int(side)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.form:
        print(json.dumps(measure_memory(args)))
        return
    result = measure(args)
    result["targets"] = judged(result)
    write_json(args.json, result)
    console = Console(width=180)
    if result["memory"]:
        console.print(memory_table(result["memory"]))
    for part in ("unet", "layers"):
        if result[part]:
            console.print(time_table(result[part]))
    for target in result["targets"]:
        verdict = "met" if target["met"] else "missed"
        console.print(f"{target['case']}: {target['target']}: {target['measured']:,.6g}, {verdict}")


if __name__ == "__main__":
    main()
