"""The command line as real processes: killed, launched in several, and with its exit codes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import hub_client as steps
from support.hub_client import fresh_process
from support.hub_server import local_hub

Make = Callable[..., Path]
GRAFTUNE = Path(sys.executable).with_name("graftune")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def start(command: list[Any], **options: Any) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        list(map(str, command)), stdout=pipe, stderr=pipe, text=True, env=environment(), **options
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_an_error_is_one_line_and_exit_code_2(make_recipe: Make) -> None:
    """Through the console script, and with it all that a shell sees."""
    code, out, err = finish(start([GRAFTUNE, "train", make_recipe(modle="a", data="b")]))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("graftune: ")
    assert "no key 'modle'. Did you mean 'model'" in err


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    settings = {
        "model": clip,
        "data": pictures,
        "max_steps": 120,
        "save_strategy": "steps",
        "save_steps": 7,
        "save_total_limit": 2,
        "adapter": {"r": 2, "dropout": 0.1},
        "regularizers": [{"name": "l2_to_start"}, {"name": "frozen_distillation"}],
    }
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    file = make_recipe(**settings)
    process = start([sys.executable, "-m", "graftune", "train", file, "--output_dir", killed])
    while process.poll() is None and not list(killed.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    code, _, _ = finish(process)
    assert code == -signal.SIGKILL, "it was over before it was killed"
    assert not (killed / "results.json").exists()

    printed = run("train", file, "--resume", "auto", "--output_dir", killed)
    assert "Going on from" in printed
    run("train", file, "--output_dir", whole)
    tensors = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (killed, whole)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert results(killed)["metrics"] == results(whole)["metrics"]
    assert results(killed)["resumed_from"] is not None


def small_files() -> None:
    """Let this process write no file of more than 64 KiB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path
) -> None:
    file = make_recipe(
        model=clip, data=pictures, save_strategy="steps", save_steps=2, adapter={"r": 32}
    )
    code, _, err = finish(start([GRAFTUNE, "train", file], preexec_fn=small_files))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("graftune: ")]
    assert "could not write checkpoint-2" in line
    assert "`resume: auto`" in line
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_two_processes_train_like_one(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    settings = {"model": clip, "data": pictures, "logging_steps": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    file = make_recipe(**settings, per_device_train_batch_size=2)
    command = [*torchrun, "--nproc_per_node=2", "-m", "graftune", "train", file]
    code, out, err = finish(start([*command, "--output_dir", tmp_path / "two"]))
    assert code == 0, err[-3000:]
    assert out.count("Written to") == 1  # by one of them
    run("train", file, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["hardware"]["processes"] == 2
    losses = [[e["loss"] for e in r["log_history"] if "loss" in e] for r in (one, two)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for when in ("before", "after"):
        found, expected = (r["metrics"][when]["colours, held out"] for r in (two, one))
        assert found["accuracy"] == expected["accuracy"]


@pytest.mark.slow
def test_accelerate_launches_it(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    file = make_recipe(model=clip, data=pictures)
    code, out, err = finish(start([*launcher, "-m", "graftune", "train", file]))
    assert code == 0, err[-3000:]
    assert "Written to" in out
    assert results(tmp_path / "out")["steps"] == 4


def in_process(arguments: list[str]) -> tuple[int, str, str]:
    """What `graftune` returns and prints, in a process that has its own environment."""
    import contextlib
    import io

    from graftune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_adapter_goes_to_the_hub_and_comes_back(
    make_recipe: Make, clip: str, pictures: str, trained: Path, tmp_path: Path
) -> None:
    file = make_recipe(model=clip, data=pictures)
    with (
        local_hub({"a-token": "user"}) as hub,
        fresh_process(hub.environment(tmp_path / "home", token="a-token")) as call,
    ):
        code, out, err = call(in_process, ["train", str(file), "--push_to", "user/by-training"])
        assert code == 0, err
        assert f"Published: {hub.endpoint}/user/by-training" in out
        code, out, err = call(in_process, ["push", str(trained / "adapter"), "user/by-hand"])
        assert code == 0, err
        assert out.strip() == f"{hub.endpoint}/user/by-hand"
        code, out, err = call(in_process, ["inspect", "user/by-hand", "--json"])
        assert code == 0, err
        assert json.loads(out)["training"]["seed"] == 42
        shutil.rmtree(tmp_path / "out")
        code, out, err = call(in_process, ["train", str(file), "--push_to", "stranger/name"])
        assert code == 2
        line = next(line for line in err.splitlines() if line.startswith("graftune: "))
        assert "is saved in" in line
        assert "graftune push" in line
        assert call(steps.attempt, os.path.isdir, str(tmp_path / "out" / "adapter"))[1].endswith(
            "True"
        )
    card = hub.files("user/by-training")["README.md"].decode()
    assert "library_name: peft" in card
    assert "model-index:" in card
