"""Comparing a model with what was exported from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import graftune
from support.models import MODELS, ModelCase


def flora(case: ModelCase, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A FLoRA adapter with other than its first values."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"r": 3, "init_weights": False, **options}
        return graftune.wrap(case.build().to(dtype), "flora", **options)


def output(case: ModelCase, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.batch().items()}
    with torch.no_grad():
        return case.run(model, batch)


def assert_same(case: ModelCase, exported: nn.Module, model: nn.Module, tolerance: float) -> None:
    """Check that outputs agree to a tolerance that is relative to what the adapter changes."""
    dtype = next(iter(model.parameters())).dtype
    expected = output(case, model, dtype)
    change = (expected - output(case, case.build().to(dtype), dtype)).abs().max()
    assert change > 1e-3
    distance = (output(case, exported, dtype) - expected).abs().max()
    assert distance <= tolerance * change, float(distance / change)


# What a process runs in which graftune cannot be imported: it loads each LoRA with PEFT alone.
_ALONE = """
import importlib.abc, json, sys, warnings

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "graftune":
            raise ModuleNotFoundError("graftune is not installed here", name="graftune")

sys.meta_path.insert(0, Blocker())
try:
    import graftune
    raise SystemExit("graftune could be imported")
except ModuleNotFoundError:
    pass

import peft, torch
from safetensors.torch import load_file
from support.models import MODELS

distances = {}
for family in sys.argv[2:]:
    case = MODELS[family]
    expected = load_file(f"{sys.argv[1]}/{family}.safetensors")["output"]
    model = peft.PeftModel.from_pretrained(case.build(), f"{sys.argv[1]}/{family}")
    with torch.no_grad():
        base, adapted = case.run(case.build(), case.batch()), case.run(model, case.batch())
    change = (expected - base).abs().max()
    distances[family] = float((adapted - expected).abs().max() / change)
assert not any(name.partition(".")[0] == "graftune" for name in sys.modules)
print(json.dumps(distances))
"""


def distances_without_graftune(folder: Path, families: list[str]) -> dict[str, float]:
    """Load LoRAs with plain PEFT in a process without graftune; return distances of outputs.

    Args:
        folder: holds a LoRA and a safetensors file with "output" for each family, by its name.
        families: names of `MODELS`.
    """
    assert set(families) <= set(MODELS)
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ALONE, str(folder), *families],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
