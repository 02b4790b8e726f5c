"""The model card: valid metadata, code for every family, and people's own words kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

import graftune
from graftune.integrations.sharing import (
    TrainingRecord,
    describe,
    fetch_adapter,
    model_card,
    read_record,
    write_record,
)
from graftune.integrations.sharing.own_words import own_words
from support.hub_store import metadata_errors
from support.models import MODELS

CONFIG = "adapter_config.json"
TEMPLATE = ModelCard.from_template(ModelCardData()).text
RECORD = TrainingRecord(
    "flora",
    regularizers=[{"name": "l2_to_start", "weight": 0.1}],
    task="image-classification",
    seed=7,
    steps=200,
    metrics={"my pictures": {"accuracy": 0.5, "loss": math.nan, "curve": [1, 2]}},
)


def save(folder: Path, model: nn.Module | None = None, method: Any = "flora") -> Path:
    graftune.wrap(model or SMALL.build(), method, r=2).save_pretrained(folder)
    return folder


SMALL = MODELS["torch-cnn"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "emoji-flora")


def saved_card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def code(card: str) -> list[str]:
    return card.split("```python\n")[1].split("\n```")[0].splitlines()


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


# What is in it.


def test_a_saved_adapter_s_card_imports_graftune(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert code(text)[0] == "import graftune"
    assert "[More Information Needed]" not in text
    assert metadata_errors(text) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        CONFIG,
        "adapter_model.safetensors",
    ]


def test_the_card_says_what_the_files_hold(folder: Path) -> None:
    facts = describe(folder)
    text = model_card(folder, RECORD)
    assert facts.parameters == 240
    for words in ("2405.14739", "240 in 18 tensors", f"{facts.bytes:,} bytes", "| seed | 7 |"):
        assert words in text
    assert f"`{facts.base_digest.rpartition(':')[0]}`" in text  # type: ignore[union-attr]
    assert "| my pictures | accuracy | 0.5 |" in text


def test_what_is_no_adapter_is_said(folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        describe(folder)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        describe(folder.parent)


def test_metadata_pass_the_hub_s_rules_and_come_back(folder: Path) -> None:
    set_config(folder, base_model_name_or_path="openai/clip-vit-base-patch16")
    text = model_card(folder, RECORD, repo_id="user/emoji-flora")
    assert metadata_errors(text) == []
    card = ModelCard(text)
    assert str(card) == text.rstrip("\n") + "\n"
    assert card.data.to_dict()["base_model"] == "openai/clip-vit-base-patch16"
    assert card.data.tags[:3] == [
        "graftune",
        "flora",
        "base_model:adapter:openai/clip-vit-base-patch16",
    ]
    # NaN and lists are no values of a model index.
    assert card.data.eval_results == [
        EvalResult("image-classification", "my-pictures", "my pictures", "accuracy", 0.5)
    ]
    assert card.data.model_name == "emoji-flora"


@pytest.mark.parametrize("name", ["flowers", "user/flowers", "Café | 16 shots", "a/b/c", "???"])
def test_any_name_of_data_is_allowed(folder: Path, name: str) -> None:
    record = TrainingRecord("flora", metrics={name: {"accuracy": 1}})
    text = model_card(folder, record)
    assert metadata_errors(text) == []
    (result,) = ModelCard(text).data.eval_results
    assert result.dataset_name == name


# The base model.


@pytest.mark.parametrize("base", ["/data/clip", "./clip", "../clip", "a/b/c", "~/clip", None, ""])
def test_a_base_that_is_no_repository_is_left_out(folder: Path, base: str | None) -> None:
    set_config(folder, base_model_name_or_path=base)
    text = model_card(folder)
    card = ModelCard(text)
    assert card.data.base_model is None
    assert not any("base_model" in tag for tag in card.data.tags)
    assert card.text.count("<!-- base_model is left out") == 1


def test_a_relative_path_stays_a_path_when_its_folder_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    set_config(folder, base_model_name_or_path="models/clip")
    write_record(folder, RECORD)
    monkeypatch.chdir(folder)
    assert ModelCard(model_card(folder)).data.base_model is None


def test_a_base_written_into_the_card_by_hand_is_taken(folder: Path) -> None:
    set_config(folder, base_model_name_or_path="/data/clip")
    card = saved_card(folder)
    card.data.base_model = "openai/clip-vit-base-patch16"
    card.save(folder / "README.md")
    again = ModelCard(model_card(folder))
    assert again.data.base_model == "openai/clip-vit-base-patch16"
    assert "left out" not in again.text


# The code.


@pytest.mark.parametrize(
    ("name", "base", "lines"),
    [
        (
            "transformers-vit",
            "google/vit",
            (
                "from transformers import ViTForImageClassification",
                'ViTForImageClassification.from_pretrained("google/vit")',
            ),
        ),
        (
            "transformers-llama",
            "a/llama",
            (
                "from transformers import AutoModelForCausalLM",
                'AutoModelForCausalLM.from_pretrained("a/llama")',
            ),
        ),
        (
            "open_clip-vit",
            "a/clip",
            ("import open_clip", 'open_clip.create_model("hf-hub:a/clip")'),
        ),
        (
            "timm-vit",
            "timm/vit",
            ("import timm", 'timm.create_model("hf-hub:timm/vit", pretrained=True)'),
        ),
        (
            "diffusers-unet",
            "a/sd",
            (
                "from diffusers import UNet2DConditionModel",
                'UNet2DConditionModel.from_pretrained("a/sd", subfolder="unet")',
            ),
        ),
        (
            "diffusers-dit",
            None,
            (
                "from diffusers import DiTTransformer2DModel",
                "DiTTransformer2DModel.from_pretrained("
                '"path/to/the/base/model", subfolder="transformer")',
            ),
        ),
        ("torch-cnn", None, ("base = ...  # the SmallCNN that it was trained on", "base")),
    ],
)
def test_three_lines_load_it(
    tmp_path: Path, name: str, base: str | None, lines: tuple[str, str]
) -> None:
    save(tmp_path, MODELS[name].build())
    set_config(tmp_path, base_model_name_or_path=base)
    text = model_card(tmp_path, repo_id="user/adapter")
    loads = f'model = graftune.load({lines[1]}, "user/adapter")'
    assert code(text) == ["import graftune", lines[0], loads]
    compile("\n".join(code(text)), "card", "exec")


def test_the_revision_of_the_base_is_in_the_code(tmp_path: Path) -> None:
    save(tmp_path, MODELS["transformers-vit"].build())
    set_config(tmp_path, base_model_name_or_path="google/vit", revision="v2")
    assert '.from_pretrained("google/vit", revision="v2")' in model_card(tmp_path)


def test_an_adapter_of_peft_gets_a_card_too(tmp_path: Path) -> None:
    save(tmp_path, MODELS["transformers-vit"].build(), peft.LoraConfig())
    write_record(tmp_path, TrainingRecord("lora", seed=1))
    card = saved_card(tmp_path)
    assert metadata_errors(str(card)) == []
    assert {"graftune", "lora"} <= set(card.data.tags)
    assert code(card.text)[0] == "import graftune"
    assert "[More Information Needed]" not in card.text


# What people wrote.


def test_saving_again_keeps_the_record_and_what_people_wrote(tmp_path: Path) -> None:
    model = graftune.wrap(MODELS["transformers-vit"].build(), "flora", r=2)
    model.save_pretrained(tmp_path)
    write_record(tmp_path, RECORD)
    card = saved_card(tmp_path)
    card.data.license = "apache-2.0"
    card.text = f"Above.\n{card.text}\n## Limits\n\nBelow.\n"
    card.save(tmp_path / "README.md")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    again = saved_card(tmp_path)
    assert again.data.license == "apache-2.0"
    assert again.text.strip().startswith("Above.\n\n<!-- graftune: begin -->")
    assert again.text.strip().endswith("<!-- graftune: end -->\n\n## Limits\n\nBelow.")
    assert again.text.count("## Loading it") == 1
    record = read_record(tmp_path)
    assert record is not None
    assert str(record) == str(RECORD)  # NaN is not equal to itself


def test_results_of_people_stay_and_ours_follow_the_record(folder: Path) -> None:
    write_record(folder, RECORD)
    card = saved_card(folder)
    own = EvalResult("image-classification", "theirs", "theirs", "accuracy", 0.75)
    card.data.eval_results.append(own)
    card.save(folder / "README.md")
    write_record(folder, TrainingRecord("flora", metrics={"new": {"accuracy": 0.625}}))
    results = saved_card(folder).data.eval_results
    assert [(r.dataset_name, r.metric_value) for r in results] == [
        ("new", 0.625),
        ("theirs", 0.75),
    ]


def test_a_template_that_nobody_filled_in_leaves_nothing() -> None:
    assert own_words(TEMPLATE) == ("", "")
    assert own_words(f"{TEMPLATE}\n### Framework versions\n\n- PEFT 0.21.2") == ("", "")


def test_what_was_filled_into_a_template_stays_under_its_heading() -> None:
    filled = TEMPLATE.replace(
        "- **Developed by:** [More Information Needed]", "- **Developed by:** me"
    ).replace("## Glossary [optional]\n", "## Glossary [optional]\n\nEmoji: a picture.\n")
    _, words = own_words(filled)
    assert words == (
        "## Model Details\n\n### Model Description\n\n- **Developed by:** me\n\n"
        "## Glossary [optional]\n\nEmoji: a picture."
    )


def test_text_of_ones_own_is_not_touched() -> None:
    text = "# Mine\n\n\n\n```sh\n# no heading\n## Results\n```\n\n## Empty\n\n- PEFT 1\n"
    assert own_words(text) == ("", text.strip("\n"))
    _, mixed = own_words(f"[More Information Needed]\n{text}")
    assert "# no heading\n## Results\n```" in mixed
    assert "## Empty" in mixed


def test_a_config_saved_by_itself_gets_no_card(tmp_path: Path) -> None:
    graftune.FloraConfig().save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_a_local_folder_is_fetched_as_it_is(folder: Path) -> None:
    assert fetch_adapter(str(folder), card=True) == folder
    assert fetch_adapter(str(folder.parent), folder.name) == folder
