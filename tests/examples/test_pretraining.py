"""The pretraining scripts run as their cards say, and go on from where they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "pretraining"


def run(script: str, folder: Path, steps: int) -> str:
    options = ["--batch", "8", "--save-every", "1", "--steps", str(steps)]
    folders = ["--state", str(folder / "state"), "--out", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *options, *folders],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "weights"),
    [
        ("pretrain_clip.py", "model.safetensors"),
        ("pretrain_unet.py", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_stopped_run_goes_on(script: str, weights: str, tmp_path: Path) -> None:
    assert "resumed" not in run(script, tmp_path, 1)
    written = (tmp_path / "out" / weights).read_bytes()
    assert "resumed at step 1" in run(script, tmp_path, 2)
    assert (tmp_path / "out" / weights).read_bytes() != written
