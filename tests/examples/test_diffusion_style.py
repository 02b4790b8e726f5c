"""The diffusion example as a user runs it: on the embedded UNet, and on a pipeline of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion_style
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import graftune
from embedded.diffusion import UNET, drawn
from embedded.pictures import FAR, load_style
from embedded.styles import style_task
from support import folders

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "diffusion_style.py"
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
SCORES = {"FID", "KID", "CLIP", "VLHI", "old kept", "old FID"}


def run(output: Path, *options: Any, launch: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Run the example; return what it printed, and its rows."""
    command = [sys.executable, *(LAUNCH if launch else []), EXAMPLE, *options]
    command += ["--use_cpu", "--output_dir", output, "--max_steps", 2, "--sampling_steps", 2]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, json.loads((output / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_the_embedded_unet(tmp_path: Path) -> None:
    printed, rows = run(tmp_path, "--prior", 3, "--per_device_train_batch_size", 2)
    base, sara, flora, lora, full = rows
    assert [row["method"] for row in rows] == ["base model", "sara", "flora", "lora", "full"]
    assert all(row.keys() >= SCORES for row in rows)
    assert base["old kept"] == pytest.approx(100, abs=1e-3)
    assert abs(sara["trained"] - 500_000) < 1_000  # fewer where magnitudes tie
    assert abs(flora["trained"] - 500_000) < 20_000
    assert abs(lora["trained"] - 500_000) < 20_000
    assert full["trained"] > 5_000_000
    assert "Written to" in printed
    for method in ("sara", "flora", "lora", "full"):
        with Image.open(tmp_path / method / "grid.png") as grid:
            assert grid.size == (12 * 52 - 4, 5 * 52 - 4)

    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(UNET).float()
    model = graftune.load(unet, tmp_path / "sara")
    trained = sum(p.numel() for name, p in model.named_parameters() if "sara_" in name)
    assert trained == sara["trained"]
    values = load_file(tmp_path / "sara" / "adapter_model.safetensors")
    assert sum(value.numel() for value in values.values()) < 510_000


@pytest.mark.slow
def test_a_pipeline_and_pictures_of_ones_own(tmp_path: Path) -> None:
    pipeline, clip = folders.latent_pipeline(tmp_path / "p"), folders.clip(tmp_path / "clip")
    data = Path(folders.pictures(tmp_path / "data", count=3))
    lines = [
        json.dumps({"file_name": str(file.relative_to(data)), "text": f"a {file.parent.name} dog"})
        for file in sorted(data.rglob("*.png"))
    ]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    own = ["--model", pipeline, "--data", data, "--template", "{} in the rain", "--clip", clip]
    options = ["--methods", "flora", "lora", "--parameters", 2000, "--rates", "lora=1e-3"]
    _, rows = run(tmp_path / "out", *own, *options, "--guidance", 3, launch=True)
    assert [row["method"] for row in rows] == ["base model", "flora", "lora"]
    for method in ("flora", "lora"):
        with Image.open(tmp_path / "out" / method / "grid.png") as grid:
            assert grid.size == (12 * 20 - 4, 5 * 20 - 4)


def test_the_papers_rate_follows_from_the_threshold() -> None:
    options = diffusion_style.Options(model="a pipeline", data="pictures")
    model = SimpleNamespace(active_peft_config=SimpleNamespace(cutoff=2e-3))
    rate = diffusion_style.rate_of("sara", model, options)
    assert rate == pytest.approx(4.966e-4, rel=1e-3)
    assert diffusion_style.rate_of("lora", model, options) == 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "dora"], "no method 'dora'; there are sara, flora, lora, full"),
        (["--data", "somewhere"], "--model and --data belong together"),
    ],
)
def test_options_that_lead_nowhere(options: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), *options, "--use_cpu", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr


def test_variants_of_an_emoji_are_not_split() -> None:
    task = style_task(seed=3)
    group = {emoji.name: emoji.group for emoji in load_style(FAR).emoji}
    parts = [
        {group[name] for name in part.names} for part in (task.train, task.validation, task.test)
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert sum(map(len, parts)) > 200
    known = set(drawn()[1])
    assert all(name in known for name in task.test.names)
    assert all(
        len(part.names) == len(part.images) == len(part.old_images)
        for part in vars(task).values()
        if not isinstance(part, int)
    )


def test_the_unet_is_what_its_card_says() -> None:
    found = json.loads((UNET / "evaluation.json").read_text())
    assert all(bar["reached"] for bar in found["bars"].values())
    tensors = load_file(UNET / "diffusion_pytorch_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == found["parameters"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
