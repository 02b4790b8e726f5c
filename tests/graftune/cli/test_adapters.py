"""The commands for adapters that exist: eval, inspect, merge, export and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, CLIPModel

import graftune
from graftune.integrations.sharing.export import apply_difference
from support import folders

Make = Callable[..., Path]


def outputs(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 48, 48, generator=generator)
    tokens = torch.tensor([[5, 6, 7, model.config.text_config.eos_token_id]])
    with torch.no_grad():
        return model.eval()(input_ids=tokens, pixel_values=pixels).logits_per_image


@pytest.fixture
def expected(trained: Path, clip: str) -> torch.Tensor:
    return outputs(graftune.load(CLIPModel.from_pretrained(clip), trained / "adapter"))


def test_eval_measures_what_training_measured(
    make_recipe: Make, clip: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    other = folders.pictures(tmp_path / "other", count=2)
    file = make_recipe(model=clip, data=pictures, template="a {} thing", eval_data=other)
    run("train", file, "--per_device_eval_batch_size", 32)
    measured = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    printed = run("eval", tmp_path / "out" / "adapter", "--data", other, "--use_cpu", "--json")
    found = json.loads(printed)
    assert found["metrics"]["base"]["other, train"] == measured["before"]["other"]
    assert found["metrics"]["adapted"]["other, train"] == measured["after"]["other"]
    assert found["model"] == clip
    assert found["data"]["class_names"] == list(folders.COLOURS)


def test_class_names_are_swapped(trained: Path, pictures: str, run: Any, fails: Any) -> None:
    chosen = [trained / "adapter", "--data", pictures, "--classes", "red", "blue", "--use_cpu"]
    own = json.loads(run("eval", *chosen, "--json"))["metrics"]
    given = json.loads(run("eval", *chosen, "--class_names", "red", "blue", "--json"))["metrics"]
    assert given == own
    other = json.loads(run("eval", *chosen, "--class_names", "ruby", "sky", "grass", "--json"))[
        "metrics"
    ]
    assert other["base"] != own["base"]
    said = fails("eval", *chosen, "--class_names", "ruby")
    assert "there are 1 class names and 2 classes in the data" in said


def test_eval_prints_a_table_and_writes_json(
    trained: Path, pictures: str, tmp_path: Path, run: Any
) -> None:
    file = tmp_path / "new" / "eval.json"
    printed = run("eval", trained / "adapter", "--data", pictures, "--use_cpu", "--json", file)
    assert "balanced_accuracy" in printed
    assert "adapted" in printed
    assert "colours, train" in json.loads(file.read_text())["metrics"]["adapted"]


def test_inspect(trained: Path, clip: str, run: Any) -> None:
    printed = run("inspect", trained / "adapter")
    for text in (
        "FLORA",
        clip,
        "frozen_distillation",
        "parameters",
        "tensors",
        "base digest",
        "1:",
        "F32",
        "learning_rate 0.01",
        "colours, held out",
        "seed",
        "a picture of {}",
    ):
        assert text in printed, text
    found = json.loads(run("inspect", trained / "adapter", "--json"))
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == (trained / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (found["base"]["name"], found["base"]["class"]) == (clip, "CLIPModel")
    assert found["base"]["digest"].count(":") == 2
    assert found["settings"]["r"] == 2
    assert found["regularizers"][0]["name"] == "frozen_distillation"
    assert found["training"]["steps"] == 4


def test_inspect_of_an_adapter_that_others_saved(tmp_path: Path, run: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(model, LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "lora")
    printed = run("inspect", tmp_path / "lora")
    assert "LORA" in printed
    assert "How it was trained is not recorded." in printed
    assert json.loads(run("inspect", tmp_path / "lora", "--json"))["training"] is None


@pytest.mark.parametrize("store_indices", [False, True])
def test_inspect_counts_trained_entries(tmp_path: Path, run: Any, store_indices: bool) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 40))
    options = {"num_parameters": 500, "store_indices": store_indices, "regularizers": []}
    model = graftune.wrap(base, "sara", **options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "sara")
    printed = run("inspect", tmp_path / "sara")
    assert "SARA" in printed
    assert f"{trained:,} in " in printed
    found = json.loads(run("inspect", tmp_path / "sara", "--json"))
    assert found["parameters"] == trained
    assert found["settings"]["num_parameters"] == 500
    places = [t for t in found["tensors"] if ".sara_values." not in t["name"]]
    assert {t["dtype"] for t in places} <= ({"U8", "I32"} if store_indices else {"I64"})
    assert places


def test_inspect_says_which_share_is_masked(tmp_path: Path, run: Any) -> None:
    model = graftune.wrap(torch.nn.Sequential(torch.nn.Linear(10, 4)), "mask_tuning")
    with torch.no_grad():
        model.base_model.model[0].scores("default", "weight")[0][0, :5] = 0
    model.save_pretrained(tmp_path / "masks")
    printed = run("inspect", tmp_path / "masks")
    assert "12.50% of 40 weights" in printed
    found = json.loads(run("inspect", tmp_path / "masks", "--json"))
    assert found["parameters"] == 40
    (tensor,) = found["tensors"]
    assert tensor["shape"] == [4, 10]
    assert tensor["masked"] == 0.125


def test_merge(trained: Path, expected: torch.Tensor, tmp_path: Path, run: Any) -> None:
    printed = run("merge", trained / "adapter", "--output", tmp_path / "merged")
    assert "model.safetensors" in printed
    merged = CLIPModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), expected)
    # The merged model is complete: its own base model for the next adapter.
    assert graftune.integrations.libraries.base_models.load_base_model(
        str(tmp_path / "merged")
    ).transform


def test_export_as_lora(
    trained: Path, clip: str, expected: torch.Tensor, tmp_path: Path, run: Any
) -> None:
    printed = run(
        *("export", trained / "adapter", "--to", "lora", "--model", clip),
        *("--output", tmp_path / "lora", "--json"),
    )
    report = json.loads(printed)
    assert (report["format"], report["exact"], report["relative_error"]) == ("lora", True, 0.0)
    lora = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora), expected)


def test_export_as_a_smaller_lora_tells_its_error(trained: Path, tmp_path: Path, run: Any) -> None:
    printed = run(
        "export", trained / "adapter", "--to", "lora", "--rank", 1, "--output", tmp_path / "lora"
    )
    assert "relative error" in printed
    assert "largest" in printed


def test_export_as_a_difference(
    trained: Path, clip: str, expected: torch.Tensor, tmp_path: Path, run: Any
) -> None:
    file = tmp_path / "difference.safetensors"
    run("export", trained / "adapter", "--to", "diff", "--output", file)
    changed = apply_difference(CLIPModel.from_pretrained(clip), file)
    torch.testing.assert_close(outputs(changed), expected)


def test_export_as_locon_and_merged(trained: Path, tmp_path: Path, run: Any, fails: Any) -> None:
    run("export", trained / "adapter", "--to", "locon", "--output", tmp_path / "l.safetensors")
    assert any("lora_up" in name for name in load_file(tmp_path / "l.safetensors"))
    run("export", trained / "adapter", "--to", "merged", "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    said = fails("export", trained / "adapter", "--to", "diff", "--output", tmp_path / "l.bin")
    assert "must end in .safetensors" in said


def test_another_base_model_is_refused(
    trained: Path, tmp_path: Path, pictures: str, fails: Any
) -> None:
    other = CLIPModel.from_pretrained(
        json.loads((trained / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
    )
    torch.nn.init.normal_(other.vision_model.encoder.layers[0].mlp.fc1.weight)
    other.save_pretrained(tmp_path / "other")
    folders.clip(tmp_path / "whole")  # for its processor
    for file in (tmp_path / "whole").iterdir():
        if not (tmp_path / "other" / file.name).exists():
            file.rename(tmp_path / "other" / file.name)
    said = fails(
        *("merge", trained / "adapter", "--model", tmp_path / "other"),
        *("--output", tmp_path / "merged"),
    )
    assert "was trained on another base model" in said or "sampled weights" in said
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_a_record_of_its_base_or_training(
    tmp_path: Path, causal_lm: str, run: Any, fails: Any, texts: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(causal_lm)
    graftune.wrap(model, "flora", r=2, init_weights=False).save_pretrained(tmp_path / "flora")
    run("merge", tmp_path / "flora", "--output", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    measured = run("eval", tmp_path / "flora", "--data", texts, "--use_cpu", "--json")
    assert json.loads(measured)["objective"] == "causal_lm"
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
    graftune.wrap(layers, "flora", r=2).save_pretrained(tmp_path / "plain")
    said = fails("merge", tmp_path / "plain", "--output", tmp_path / "m")
    assert "does not say its base model; give it with --model" in said


def test_merging_a_model_that_has_no_objective_here(tmp_path: Path, run: Any) -> None:
    config = BertConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=9,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    model = BertModel.from_pretrained(tmp_path / "bert")
    graftune.wrap(model, "flora", r=2, init_weights=False).save_pretrained(tmp_path / "flora")
    run("merge", tmp_path / "flora", "--output", tmp_path / "merged")
    assert BertModel.from_pretrained(tmp_path / "merged")


def test_the_merged_language_model_has_its_tokenizer(
    make_recipe: Make, causal_lm: str, texts: str, tmp_path: Path, run: Any
) -> None:
    run("train", make_recipe(model=causal_lm, data=texts, dtype="bfloat16"))
    run("merge", tmp_path / "out" / "adapter", "--output", tmp_path / "m", "--dtype", "bfloat16")
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("the capital")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_recipes(run: Any) -> None:
    printed = run("recipes")
    for name, recipe in graftune.recipes().items():
        assert name in printed
        assert recipe.paper.rpartition(" ")[2] in printed
    found = json.loads(run("recipes", "--json"))
    assert list(found) == list(graftune.recipes())
    fields = {field["name"]: field["default"] for field in found["flora"]["adapter"]}
    assert (fields["r"], fields["scale"]) == (8, 1.0)
