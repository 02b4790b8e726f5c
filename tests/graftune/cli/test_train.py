"""`graftune train`: what it trains, what it writes, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import graftune
from graftune.integrations.libraries.base_models import load_base_model
from graftune.integrations.sharing import read_record
from support import folders

Make = Callable[..., Path]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_what_is_written(trained: Path, clip: str, pictures: str) -> None:
    assert sorted(p.name for p in trained.iterdir()) == ["adapter", "curves.png", "results.json"]
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (trained / "adapter").iterdir()) == files
    assert Image.open(trained / "curves.png").width > 1000
    found = results(trained)
    assert found["config"]["model"] == clip
    assert (found["config"]["learning_rate"], found["config"]["adapter"]) == (0.01, {"r": 2})
    sets = ["colours, held out", "colours, held out, other classes"]
    for when in ("before", "after"):
        assert list(found["metrics"][when]) == sets
        metrics = found["metrics"][when][sets[0]]
        assert list(metrics) == ["loss", "accuracy", "balanced_accuracy"]
    assert list(found["data"]) == ["train", *sets]
    assert found["data"]["train"]["class_names"] == ["blue", "green"]
    assert found["data"][sets[1]]["class_names"] == ["red", "yellow"]
    assert (found["data"]["train"]["rows"], found["data"][sets[0]]["rows"]) == (10, 2)
    assert len(found["data"]["train"]["digest"]) == 64
    assert (found["seed"], found["steps"], found["resumed_from"]) == (42, 4, None)
    assert found["regularizers"][0]["name"] == "frozen_distillation"
    assert [entry["step"] for entry in found["log_history"] if "loss" in entry] == [2, 4]
    assert "frozen_distillation" in found["log_history"][0]
    assert found["versions"]["graftune"] == graftune.__version__
    assert found["hardware"]["processes"] == 1
    assert found["adapter"]["bytes"] == (
        (trained / "adapter" / "adapter_model.safetensors").stat().st_size
    )
    assert found["peak_memory_bytes"] > 1e6


def test_the_card_says_how_it_was_trained(trained: Path) -> None:
    record = read_record(trained / "adapter")
    assert record is not None
    assert (record.method, record.seed, record.steps) == ("flora", 42, 4)
    assert record.objective["template"] == ["a picture of {}"]
    assert record.hyperparameters["learning_rate"] == 0.01
    assert record.regularizers[0]["weight"] == 0.5
    metrics = record.metrics["colours, held out"]
    assert (
        metrics["accuracy"] == results(trained)["metrics"]["after"]["colours, held out"]["accuracy"]
    )
    assert "accuracy of the base model" in metrics
    assert "model-index" in (trained / "adapter" / "README.md").read_text()


def test_the_table_shows_what_changed(
    make_recipe: Make, clip: str, pictures: str, run: Any
) -> None:
    printed = run("train", make_recipe(model=clip, data=pictures))
    assert "flora on" in printed
    assert "Training on 20 rows by class_names; measuring on colours, held out" in printed
    assert "balanced_accuracy" in printed
    assert "base model" in printed
    assert "adapter (" in printed
    assert "KiB), results.json, curves.png" in printed


def test_images_with_a_new_head(
    make_recipe: Make, classifier: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    file = make_recipe(
        model=classifier, data=pictures, max_steps=30, label_smoothing_factor=0.1, shots=3
    )
    printed = run("train", file)
    assert "The head classifier is new, for 4 classes" in printed
    found = results(tmp_path / "out")
    assert found["objective"] == {
        "name": "image_classes",
        "head": "new",
        "class_names": ["blue", "green", "red", "yellow"],
    }
    assert found["data"]["train"]["rows"] == 12
    metrics = found["metrics"]
    after, before = (metrics[k]["colours, held out"]["loss"] for k in ("after", "before"))
    assert after < before
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in tensors
    # The head comes back with the adapter, whatever the base model's new one starts as.
    torch.manual_seed(7)
    run("eval", tmp_path / "out" / "adapter", "--data", pictures, "--json", tmp_path / "e.json")
    measured = json.loads((tmp_path / "e.json").read_text())["metrics"]["adapted"]
    assert measured["colours, train"]["accuracy"] > 0.5


def test_a_kept_head_takes_labels_by_name(make_recipe: Make, pictures: str, tmp_path: Path) -> None:
    names = ["yellow", "pink", "red", "green", "blue"]
    model = folders.classifier(tmp_path / "vit", names)
    from graftune.cli import main

    assert main(["train", str(make_recipe(model=model, data=pictures))]) == 0
    found = results(tmp_path / "out")
    assert (found["objective"]["head"], found["objective"]["class_names"]) == ("keep", names)
    assert found["data"]["train"]["class_names"] == ["blue", "green", "red", "yellow"]


def test_a_language_model(
    make_recipe: Make, causal_lm: str, texts: str, tmp_path: Path, run: Any
) -> None:
    file = make_recipe(model=causal_lm, data=texts, recipe="lora", max_steps=20)
    run("train", file, "--regularizers", "[{name: l2_to_start, weight: 0.1}]")
    found = results(tmp_path / "out")
    assert found["objective"] == {"name": "causal_lm", "max_length": 64, "pack": False}
    before, after = (found["metrics"][k]["texts.jsonl, held out"] for k in ("before", "after"))
    assert after["token_accuracy"] > before["token_accuracy"]
    assert set(after) == {"loss", "perplexity", "token_accuracy"}
    assert found["adapter"]["method"] == "LORA"
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["regularizers"][0]["name"]) == ("CAUSAL_LM", "l2_to_start")
    measured = run("eval", tmp_path / "out" / "adapter", "--data", texts, "--use_cpu", "--json")
    metrics = json.loads(measured)["metrics"]
    assert (
        metrics["adapted"]["texts.jsonl, train"]["loss"]
        < (metrics["base"]["texts.jsonl, train"]["loss"])
    )


def test_one_text_is_measured_on_a_part_of_its_tokens(
    make_recipe: Make, causal_lm: str, tmp_path: Path, run: Any
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(folders.SENTENCES))
    run("train", make_recipe(model=causal_lm, data=str(tmp_path / "book.txt"), max_length=32))
    found = results(tmp_path / "out")
    rows = [found["data"][part]["rows"] for part in ("train", "book.txt, held out")]
    assert rows[0] > rows[1] >= 1
    assert found["objective"]["max_length"] == 32


@pytest.mark.parametrize("kind", ["pixels", "classes", "latents"])
def test_denoisers(kind: str, make_recipe: Make, pictures: str, tmp_path: Path, run: Any) -> None:
    if kind == "latents":
        model = folders.latent_pipeline(tmp_path / "pipeline")
    else:
        model = folders.pixel_pipeline(tmp_path / "pipeline", 4 if kind == "classes" else None)
    file = make_recipe(model=f"diffusers:{model}/unet", data=pictures, template="a {} square")
    run("train", file)
    found = results(tmp_path / "out")
    settings = {
        "pixels": {},
        "classes": {"class_names": list(folders.COLOURS)},
        "latents": {"template": "a {} square"},
    }[kind]
    assert found["objective"] == {"name": "denoising", **settings}
    assert list(found["metrics"]["after"]["colours, held out"]) == ["loss"]
    args = ["--model", f"diffusers:{model}/unet", "--data", pictures, "--use_cpu", "--json"]
    measured = json.loads(run("eval", tmp_path / "out" / "adapter", *args))["metrics"]
    assert measured["base"] != measured["adapted"]


def test_models_of_timm_and_open_clip(
    make_recipe: Make, pictures: str, tmp_path: Path, run: Any
) -> None:
    for maker, head in ((folders.timm_model, "new"), (folders.open_clip_model, None)):
        name = maker(tmp_path / maker.__name__)
        output = tmp_path / f"{maker.__name__}_out"
        run("train", make_recipe(model=name, data=pictures, output_dir=str(output)))
        assert results(output)["objective"].get("head") == head
        base = load_base_model(
            name,
            class_names=list(folders.COLOURS) if head else None,
        )
        assert graftune.load(base.model, output / "adapter")


def test_data_to_measure_on(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    other = folders.pictures(tmp_path / "others", count=2)
    file = make_recipe(model=clip, data=pictures, classes=["red", "blue"])
    run("train", file, "--eval_data", other)
    found = results(tmp_path / "out")
    assert list(found["metrics"]["after"]) == ["others", "others, other classes"]
    assert (found["data"]["train"]["rows"], found["data"]["others"]["rows"]) == (12, 4)
    run("train", file, "--eval_share", 0, "--output_dir", tmp_path / "unmeasured")
    assert results(tmp_path / "unmeasured")["metrics"] == {"before": {}, "after": {}}
    assert (tmp_path / "unmeasured" / "curves.png").is_file()


def test_splits(make_recipe: Make, clip: str, tmp_path: Path, run: Any, fails: Any) -> None:
    for part, count in (("train", 3), ("test", 2)):
        folders.pictures(tmp_path / "data" / part, count)
    file = make_recipe(model=clip, data=str(tmp_path / "data"))
    run("train", file, "--eval_split", "test", "--eval_strategy", "steps", "--eval_steps", 2)
    found = results(tmp_path / "out")
    assert (found["data"]["train"]["rows"], found["data"]["data, test"]["rows"]) == (12, 8)
    assert [e["step"] for e in found["log_history"] if "eval_accuracy" in e] == [2, 4, 4]
    assert "which is trained on" in fails("train", file, "--eval_split", "train")
    assert "Did you mean 'test'" in fails("train", file, "--eval_split", "tst")


def test_unreadable_pictures_stop_or_are_counted(
    make_recipe: Make, clip: str, tmp_path: Path, run: Any, fails: Any
) -> None:
    folder = Path(folders.pictures(tmp_path / "broken", 4))
    for name in ("red", "blue"):
        (folder / name / "0.png").write_bytes(b"no picture")
    file = make_recipe(model=clip, data=str(folder), num_train_epochs=1, max_steps=-1)
    said = fails("train", file)
    assert "0.png cannot be read: not a picture" in said
    assert "leave such pictures out with `unreadable: skip`" in said
    printed = run("train", file, "--unreadable", "skip")
    assert "2 pictures could not be read" in printed
    assert len(results(tmp_path / "out")["unreadable"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "flra"}, "there is no recipe 'flra'. Did you mean 'flora'"),
        ({"recipe": "lorra"}, "Did you mean 'lora'"),
        ({"adapter": {"rank": 2}}, "the adapter of 'flora' has no field 'rank'"),
        ({"adapter": {"peft_type": "LORA"}}, "the adapter of 'flora' has no field 'peft_type'"),
        (
            {"recipe": "prompt_tuning", "adapter": {"num_virtual_tokens": 2}},
            "puts prompts before the input of a language model, and CLIPModel is none",
        ),
        ({"recipe": "ia3", "adapter": {}}, "Please specify `feedforward_modules`"),
        ({"adapter": {"r": 0}}, "`r` must be a positive int"),
        ({"regularizers": [{"name": "l2_to_strat"}]}, "Did you mean 'l2_to_start'"),
        ({"regularizers": [{"name": "l2_to_start", "wieght": 1}]}, "Did you mean 'weight'"),
        ({"classes": ["blue", "gren"]}, "no class 'gren' in the data"),
        ({"shots": 9}, "fewer than shots = 9"),
        ({"template": "a picture"}, "needs exactly one {} for the class name"),
        ({"data": "/nowhere/at/all"}, "there is no file or folder /nowhere/at/all"),
        ({"model": "openclip:ViT-B-32"}, "Did you mean 'open_clip'"),
        ({"objective": "denoising"}, "is for 'class_names', 'image_classes', 'causal_lm'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for image_classes"),
        ({"push_to": "a/b/c"}, "Repo id must be in the form"),
        ({"learning_rate": 1e30}, "the loss is nan at step"),
        ({"resume": "nowhere"}, "no folder with a checkpoint, nor auto"),
        ({"lr_scheduler_type": "cosinus"}, "invalid choice: 'cosinus'"),
        ({"report_to": "nowhere"}, "nowhere is not supported"),
        ({"save_strategy": "sometimes"}, "invalid choice: 'sometimes'"),
    ],
)
def test_failures_end_in_one_line(
    changes: dict[str, Any], message: str, make_recipe: Make, clip: str, pictures: str, fails: Any
) -> None:
    assert message in fails("train", make_recipe(**{"model": clip, "data": pictures, **changes}))


def test_an_output_folder_that_is_a_file(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, fails: Any
) -> None:
    (tmp_path / "file").write_text("")
    file = make_recipe(model=clip, data=pictures, output_dir=str(tmp_path / "file"))
    assert "file" in fails("train", file)


def test_an_earlier_run_is_not_overwritten(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, run: Any, fails: Any
) -> None:
    file = make_recipe(model=clip, data=pictures, save_strategy="steps", save_steps=2)
    run("train", file)
    assert "checkpoint-4 is there from an earlier run: say `resume: auto`" in fails("train", file)
    printed = run("train", file, "--resume", "auto", "--max_steps", 6)
    assert "Going on from" in printed
    found = results(tmp_path / "out")
    assert found["resumed_from"].endswith("checkpoint-4")
    assert found["steps"] == 6
    run("train", file, "--resume", tmp_path / "out" / "checkpoint-2")


def test_a_half_written_checkpoint_is_passed_over(
    make_recipe: Make,
    clip: str,
    pictures: str,
    tmp_path: Path,
    run: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = make_recipe(model=clip, data=pictures, save_strategy="steps", save_steps=2)
    run("train", file)
    (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")
    run("train", file, "--resume", "auto")
    assert results(tmp_path / "out")["resumed_from"].endswith("checkpoint-2")
    assert "checkpoint-4 is not whole and passed over" in caplog.text


@pytest.mark.parametrize("package", ["rich", "matplotlib", "datasets", "PIL"])
def test_a_missing_package_names_its_extra(
    package: str,
    make_recipe: Make,
    clip: str,
    pictures: str,
    fails: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = fails("train", make_recipe(model=clip, data=pictures))
    assert said.startswith(f"this needs the package {package!r}")
    assert "pip install 'graftune[train]'" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_library_of_the_model_names_its_extra(
    make_recipe: Make, pictures: str, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    said = fails("train", make_recipe(model="open_clip:ViT-B-32", data=pictures))
    assert "pip install 'graftune[open-clip]'" in said


def test_several_methods_on_one_model(
    clip: str, pictures: str, run: Any, make_recipe: Make, tmp_path: Path
) -> None:
    file = make_recipe(
        model=clip,
        data=pictures,
        template="a picture of {}",
        recipe=["lora", "mask_tuning"],
        adapter={"r": 2, "targets": "attention+mlp"},
    )
    said = run("train", file)
    assert "lora + mask_tuning on" in said
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert [part["peft_type"] for part in config["parts"]] == ["LORA", "MASK_TUNING"]
    assert config["parts"][0]["r"] == 2
    shown = run("inspect", tmp_path / "out" / "adapter")
    assert "mask_norm" in shown
    assert "lora + mask_tuning" in shown
    run("eval", tmp_path / "out" / "adapter", "--data", pictures, "--use_cpu")
    run("merge", tmp_path / "out" / "adapter", "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
