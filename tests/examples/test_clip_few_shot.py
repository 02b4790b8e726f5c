"""The few-shot example runs as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import graftune

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EMBEDDED = EXAMPLES / "embedded" / "clip"


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    """A randomly initialised CLIP that uses the embedded one's texts and pictures."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(EMBEDDED)
    tokenizer = processor.tokenizer
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 48, "patch_size": 16}
    config = CLIPConfig(
        text_config={**shared, **text, "max_position_embeddings": 32},
        vision_config={**shared, **vision},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four classes of plain pictures, in subfolders."""
    for name in ("red", "green", "blue", "yellow"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            picture = Image.new("RGB", (40 + index, 50), name)
            picture.save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def run(launcher: list[str], output: Path, *options: Any) -> tuple[str, dict[str, Any]]:
    """Run the example, and return what it printed and the results it wrote."""
    command = [sys.executable, *launcher, EXAMPLES / "clip_few_shot.py", *options]
    result = subprocess.run(
        [*map(str, command), "--use_cpu", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(output / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 0
    assert Image.open(output / "predictions.png").width > 500
    return result.stdout, json.loads((output / "results.json").read_text())


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
    "two processes": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_own_model_and_pictures(
    launcher: str, small_clip: Path, pictures: Path, tmp_path: Path
) -> None:
    own = ["--model", small_clip, "--data", pictures, "--shots", 2, "--max_steps", 3]
    printed, results = run(["-m", *LAUNCHERS[launcher]], tmp_path / "out", *own)
    assert "Loaded in a fresh process: 8 outputs equal bit for bit." in printed
    assert list(results["accuracies"]) == ["classes trained on", "classes never trained on"]
    assert results["max_steps"] == 3
    trained_on = results["trained_on"]
    assert (trained_on["rows"], trained_on["shots"], trained_on["seed"]) == (4, 2, 0)
    assert len(trained_on["class_names"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded CLIP is not there"
)
def test_embedded_model_and_pictures(tmp_path: Path) -> None:
    # A gentle rate: at the example's own, what is kept after so few steps differs between CPUs by
    # several points.
    gentle = ["--max_steps", 60, "--learning_rate", 1.5e-3]
    printed, results = run([], tmp_path / "out", *gentle)
    assert "outputs equal bit for bit" in printed
    accuracy = results["accuracies"]
    before, after = accuracy["classes trained on"]
    assert after > before + 3
    before, after = accuracy["kept: mean of these"]
    assert after > 0.8 * before

    # The same numbers as the benchmark's own scoring gives for the saved adapter.
    from embedded.model import load_clip
    from embedded.task import features_of, few_shot_task

    base, processor = load_clip()
    model = graftune.load(base, tmp_path / "out" / "adapter").eval()
    scores = few_shot_task(seed=0, shots=16).score(*features_of(model, processor))
    assert accuracy["classes trained on"][1] == pytest.approx(scores["base"], abs=0.5)
    assert accuracy["classes never trained on"][1] == pytest.approx(scores["novel"], abs=0.5)
    assert accuracy["kept: mean of these"][1] == pytest.approx(scores["kept"], abs=0.5)
