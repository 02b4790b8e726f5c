"""Base models by name: of every library, from real folders, with what their inputs need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from graftune.integrations.data import pixels
from graftune.integrations.libraries.base_models import (
    Source,
    default_objective,
    load_base_model,
    locate,
)
from support import folders

PICTURE = Image.new("RGB", (60, 50), "red")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("openai/clip-vit-base-patch16", Source("transformers", "openai/clip-vit-base-patch16")),
        ("open_clip:ViT-B-32", Source("open_clip", "ViT-B-32")),
        ("open_clip:ViT-B-32/openai", Source("open_clip", "ViT-B-32", "openai")),
        ("open_clip:ViT-B-32//data/a.pt", Source("open_clip", "ViT-B-32", "/data/a.pt")),
        ("open_clip:hf-hub:laion/a", Source("open_clip", "hf-hub:laion/a")),
        ("timm:resnet18.a1_in1k", Source("timm", "resnet18.a1_in1k")),
        ("timm:hf-hub:timm/a", Source("timm", "hf-hub:timm/a")),
        ("diffusers:a/b", Source("diffusers", "a/b")),
        ("diffusers:a/b/unet", Source("diffusers", "a/b", "unet")),
    ],
)
def test_names_lead_to_libraries(name: str, source: Source) -> None:
    assert locate(name) == source


def test_a_gguf_file_is_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    name = str(tmp_path / "small.gguf")
    assert locate(name) == Source("transformers", str(tmp_path), "small.gguf")
    assert default_objective(name) == "causal_lm"


@pytest.mark.parametrize("name", ["openclip:ViT-B-32", "timm:", "tim:resnet18"])
def test_a_wrong_library_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"Did you mean '(open_clip|timm)'"):
        locate(name)


def test_a_clip_of_transformers(tmp_path: Path) -> None:
    base = load_base_model(folders.clip(tmp_path / "clip"))
    assert (base.objective, type(base.model).__name__) == ("class_names", "CLIPModel")
    assert not base.model.training
    assert base.tokenizer is not None
    assert base.transform is not None
    assert pixels([PICTURE], base.transform).shape == (1, 3, 48, 48)


def test_a_language_model(tmp_path: Path) -> None:
    name = folders.causal_lm(tmp_path / "lm")
    base = load_base_model(name, dtype="bfloat16")
    assert base.objective == default_objective(name) == "causal_lm"
    assert next(base.model.parameters()).dtype == torch.bfloat16
    assert base.tokenizer("the capital")["input_ids"]


def test_other_classes_get_a_new_head(tmp_path: Path) -> None:
    base = load_base_model(folders.classifier(tmp_path / "vit"), class_names=["cat", "dog"])
    assert (base.new_head, base.outputs) == ("classifier", ("cat", "dog"))
    assert base.model.classifier.out_features == 2
    assert base.model.config.id2label == {0: "cat", 1: "dog"}


def test_known_classes_keep_the_head_and_its_order(tmp_path: Path) -> None:
    name = folders.classifier(tmp_path / "vit", ["dog", "hen", "cat"])
    base = load_base_model(name, class_names=["cat", "dog"])
    assert (base.new_head, base.outputs) == (None, ("dog", "hen", "cat"))
    assert load_base_model(name, class_names=["cat", "dog"], head="new").new_head == "classifier"
    with pytest.raises(ValueError, match="cannot be kept: 'owl' not among its 3 classes"):
        load_base_model(name, class_names=["owl", "dog"], head="keep")


def test_outputs_without_names_are_kept_where_there_are_as_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = folders.classifier(tmp_path / "vit")
    base = load_base_model(name, class_names=list("abcde"))
    assert base.new_head is None
    assert "a is output 0" in caplog.text


def test_a_clip_gets_a_head_for_images_alone(tmp_path: Path) -> None:
    base = load_base_model(
        folders.clip(tmp_path / "clip"), "image_classes", class_names=["cat", "dog"]
    )
    assert (base.new_head, base.tokenizer) == ("classifier", None)


def test_timm(tmp_path: Path) -> None:
    name = folders.timm_model(tmp_path / "timm")
    assert default_objective(name) == default_objective("timm:resnet18") == "image_classes"
    base = load_base_model(name, class_names=["cat", "dog"])
    assert (base.new_head, base.model.num_classes) == ("head", 2)
    assert base.transform is not None
    assert base.model(pixels([PICTURE], base.transform)).shape == (1, 2)
    kept = load_base_model(f"timm:local-dir:{name}", class_names=list("abcde"))
    assert kept.new_head is None


def test_open_clip(tmp_path: Path) -> None:
    name = folders.open_clip_model(tmp_path / "open_clip")
    base = load_base_model(name)
    assert base.objective == "class_names"
    assert base.transform is not None
    image, text = pixels([PICTURE], base.transform), base.tokenizer(["a cat"])
    assert base.model(image, text)[0].shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33", "no model 'ViT-B-33'. Did you mean"),
        ("open_clip:ViT-B-32/laion", "ViT-B-32 has no pretrained weights 'laion'"),
        ("timm:resnet181", "timm has no model 'resnet181'. Did you mean"),
    ],
)
def test_unknown_models_of_zoos_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_base_model(name)


def test_a_pipeline_and_its_part(tmp_path: Path) -> None:
    name = folders.pixel_pipeline(tmp_path / "pipeline")
    for given in (name, f"diffusers:{name}", f"{name}/unet"):
        base = load_base_model(given)
        assert base.objective == "denoising"
        assert type(base.model).__name__ == "UNet2DModel"
        assert base.parts["scheduler"].config.num_train_timesteps == 20
        assert set(base.parts) == {"scheduler"}


def test_a_pipeline_with_latents_and_texts(tmp_path: Path) -> None:
    base = load_base_model(folders.latent_pipeline(tmp_path / "pipeline"))
    assert set(base.parts) == {"scheduler", "vae", "text_encoder"}
    assert not any(p.requires_grad for p in base.parts["vae"].parameters())
    assert base.tokenizer is not None


def test_what_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty\. Should have a `model_type`"):
        load_base_model(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="is no pipeline of diffusers"):
        load_base_model(f"diffusers:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match=r"no objective 'causal_ml'\. Did you mean 'causal_lm'"):
        load_base_model(str(tmp_path / "empty"), "causal_ml")
    with pytest.raises(ValueError, match="is for 'image_classes' and not for 'class_names'"):
        load_base_model("timm:resnet18", "class_names")
    with pytest.raises(ValueError, match="revision is for models of transformers"):
        load_base_model("timm:resnet18", revision="main")


def test_a_model_for_something_else_asks_for_the_objective(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a BertModel.*give the objective"):
        default_objective(str(tmp_path / "bert"))
