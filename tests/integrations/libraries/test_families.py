"""Models are recognised without importing their library, and get the layers of their blocks."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from graftune.integrations.libraries.families import default_targets, recognise
from support.models import MODELS


@pytest.mark.parametrize(
    ("name", "library", "task_type"),
    [
        ("transformers-clip", "transformers", None),
        ("transformers-siglip", "transformers", None),
        ("transformers-vit", "transformers", None),
        ("transformers-llama", "transformers", "CAUSAL_LM"),
        ("transformers-gpt2", "transformers", "CAUSAL_LM"),
        ("transformers-bert", "transformers", None),
        ("open_clip-vit", "open_clip", None),
        ("open_clip-resnet", "open_clip", None),
        ("timm-vit", "timm", None),
        ("timm-convnext", "timm", None),
        ("diffusers-unet", "diffusers", None),
        ("diffusers-dit", "diffusers", None),
        ("torch-transformer", "torch", None),
        ("torch-cnn", "torch", None),
    ],
)
def test_recognise(name: str, library: str, task_type: str | None) -> None:
    family = recognise(MODELS[name].build())
    assert (family.library, family.task_type) == (library, task_type)


def test_a_users_subclass_belongs_to_the_library() -> None:
    class MyViT(transformers.ViTModel):
        pass

    MyViT.__module__ = "my_project.models"
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert recognise(MyViT(config)).library == "transformers"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("transformers-clip", {"fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"}),
        ("transformers-gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("open_clip-vit", {"attn", "mlp.c_fc", "mlp.c_proj"}),
        ("timm-vit", {"attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"}),
    ],
)
def test_default_targets_by_name(name: str, targets: set[str]) -> None:
    found = {target.removeprefix("self_attn.") for target in default_targets(MODELS[name].build())}
    assert {t.rpartition(".")[2] for t in found} == {t.rpartition(".")[2] for t in targets}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_heads_embeddings_and_depthwise_convolutions_are_left_alone(name: str) -> None:
    model = MODELS[name].build()
    targets = default_targets(model)
    matched = {
        key: module
        for key, module in model.named_modules()
        if any(key == target or key.endswith(f".{target}") for target in targets)
    }
    assert matched
    for key, module in matched.items():
        assert not isinstance(module, nn.Embedding), key
        assert not key.endswith(("lm_head", "visual_projection", "text_projection")), key
        if isinstance(module, nn.Conv2d):
            assert module.groups < module.in_channels, key
