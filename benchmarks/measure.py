"""What the benchmarks share: interleaved timing, memory, operation counts, and results as JSON."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]

# The profiler writes a line to stderr at each start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def interleaved(
    steps: Mapping[str, Step],
    repeats: int,
    warmup: int = 1,
    at_least: float = 0.0,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return seconds of every step, taken in turns: A, B, C, A, B, C...

    A machine that slows down or is shared for a while then slows all steps down alike, and a
    round's times belong together.

    Args:
        steps: what to time, by name.
        repeats: how many rounds to time, at the fewest.
        warmup: how many rounds to run before.
        at_least: seconds to go on for; short steps, which are noisier, get more rounds.
        device: "cpu" or "cuda".
        clock: what tells the time; `time.process_time` leaves out what other processes take of a
            shared machine, and is right where there is one thread.
    """
    for _ in range(warmup):
        for step in steps.values():
            _seconds(step, device, clock)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rounds, total = 0, 0.0
    while rounds < repeats or total < at_least:
        for name, step in steps.items():
            seconds[name].append(_seconds(step, device, clock))
            total += seconds[name][-1]
        rounds += 1
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the ratio of the medians of two lists of times."""
    return statistics.median(over) / statistics.median(under)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median, both quartiles and the count of a list of times."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[2],
        "count": len(values),
    }


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Return how many bytes of tensors a step needs at its peak, beyond those there before.

    On a CPU they are the allocations and frees that torch.profiler records of PyTorch's
    allocator, temporaries inside operations included; on CUDA, torch.cuda.max_memory_allocated.
    Run the step once before: what is allocated once for all, like workspaces, is none of its own.
    """
    gc.collect()
    return _peak_cuda(step) if device == "cuda" else _peak_cpu(step)


def memory_method(device: str) -> str:
    """Say how `peak_bytes` measures on a device."""
    if device == "cuda":
        return "torch.cuda.max_memory_allocated during one step, less what was there before"
    return "highest sum of torch.profiler's allocation events in one step, less what was there"


def flops(step: Step) -> int:
    """Return the floating-point operations of a step, as torch.utils.flop_counter counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def environment(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return the versions, the hardware and the threads that a result depends on."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, readable by people and the same for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _seconds(step: Step, device: str, clock: Callable[[], float]) -> float:
    _synchronize(device)
    start = clock()
    step()
    _synchronize(device)
    return clock() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_cuda(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def _processor() -> str:
    """Return the processor's name: `platform` leaves it out on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
