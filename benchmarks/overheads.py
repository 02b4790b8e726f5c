"""What graftune costs beside the work itself: importing it, and checking the base model.

    python benchmarks/overheads.py

Claims: `import graftune` takes at most 0.2 s more than `import peft`; the digest of the base model
takes less than a second for 1 B parameters.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import environment, interleaved, summary, write_json
from rich.console import Console
from rich.table import Table

from graftune.adapters.base.digest import base_digest

RESULT = Path(__file__).parent / "results" / "overheads.json"
IMPORT_TARGET, DIGEST_TARGET = 0.2, 1.0


def import_seconds() -> tuple[float, float]:
    """Return how long a fresh interpreter takes for peft, and for graftune after it."""
    code = (
        "import time; a = time.perf_counter(); import peft; b = time.perf_counter(); "
        "import graftune; print(b - a, time.perf_counter() - b)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def measure_imports(repeats: int) -> dict[str, list[float]]:
    """Import both in fresh processes; the first of them only warms the file cache."""
    pairs = [import_seconds() for _ in range(repeats + 1)][1:]
    return {"peft": [pair[0] for pair in pairs], "graftune": [pair[1] for pair in pairs]}


def llama_1b_linears() -> dict[str, torch.Tensor]:
    """The 112 linear weights of a Llama of 1.2 B parameters, in bfloat16."""
    shapes = {
        "q_proj": (2048, 2048),
        "k_proj": (512, 2048),
        "v_proj": (512, 2048),
        "o_proj": (2048, 2048),
        "gate_proj": (8192, 2048),
        "up_proj": (8192, 2048),
        "down_proj": (2048, 8192),
    }
    return {
        f"layers.{layer}.{name}.weight": torch.rand(shape, dtype=torch.bfloat16) - 0.5
        for layer in range(16)
        for name, shape in shapes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()

    imports = measure_imports(args.repeats)
    more = statistics.median(imports["graftune"])
    tensors = llama_1b_linears()
    count = sum(tensor.numel() for tensor in tensors.values())
    start = time.perf_counter()
    digest = base_digest(tensors)
    first = time.perf_counter() - start
    times = interleaved({"digest": lambda: base_digest(tensors)}, args.repeats)["digest"]

    table = Table("what", "measured", "target", "met")
    met = {True: "yes", False: "no"}
    table.add_row("import peft", f"{statistics.median(imports['peft']):.2f} s", "", "")
    table.add_row(
        "import graftune, beyond peft",
        f"{more:.2f} s",
        f"≤ {IMPORT_TARGET} s",
        met[more <= IMPORT_TARGET],
    )
    table.add_row(
        f"digest of {count / 1e9:.2f} B weights in {len(tensors)} tensors, first call",
        f"{first:.3f} s",
        f"< {DIGEST_TARGET:.0f} s",
        met[first < DIGEST_TARGET],
    )
    table.add_row("the same, later calls", f"{statistics.median(times):.3f} s", "", "")
    table.add_row("length of the digest", f"{len(digest)} bytes", "", "")
    Console().print(table)
    write_json(
        args.json,
        {
            "imports": {module: summary(seconds) for module, seconds in imports.items()},
            "digest": {"weights": count, "first": first, "later": summary(times)},
            "environment": environment("cpu", ["torch", "peft", "transformers"]),
        },
    )


if __name__ == "__main__":
    main()
