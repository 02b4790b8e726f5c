"""An exported LoCon is what LyCORIS, kohya's scripts and diffusers read: exact, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lycoris
import lycoris.kohya
import peft
import pytest
import torch
from lycoris.logging import logger
from safetensors.torch import load_file
from torch import nn

import graftune
from graftune.integrations.sharing.export import export_locon
from support.exports import assert_same, flora
from support.models import MODELS
from support.untouched import assert_untouched, snapshot

logger.setLevel("ERROR")
UNEQUAL: dict[str, dict[str, Any]] = {
    "diffusers-unet": {"rank_pattern": {"conv1": [5, 3, 2, 1], "to_q": [1, 4]}, "scale": 2.0},
    "transformers-clip": {"scale_pattern": {"q_proj": 0.5}},
    "timm-convnext": {"target_modules": ".*(conv_dw|fc1|stem.0)", "r": 2},
    "torch-cnn": {"target_modules": ["grouped", "dilated", "head"], "r": [3, 4, 2, 2]}
    | {"rank_pattern": {"head": 2}},
}


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def with_lycoris(file: Path, base: nn.Module) -> nn.Module:
    with double():
        network, tensors = lycoris.create_lycoris_from_weights(1.0, str(file), base)
    assert len(network.loras) == len({name.partition(".")[0] for name in tensors})
    network.apply_to()
    return base.eval()


@pytest.mark.parametrize("family", UNEQUAL)
@pytest.mark.filterwarnings("ignore:the adapter has at least as many numbers")
def test_lycoris_computes_the_same(family: str, tmp_path: Path) -> None:
    case = MODELS[family]
    model = flora(case, torch.float64, **UNEQUAL[family])
    before = snapshot(model)
    report = export_locon(model, tmp_path / "locon.safetensors", prefix="lycoris")
    assert_untouched(model, before)
    assert report.exact
    assert report.bytes == (tmp_path / "locon.safetensors").stat().st_size
    assert_same(
        case, with_lycoris(tmp_path / "locon.safetensors", case.build().double()), model, 1e-12
    )


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("r", [(4, 2), (2, 3)])
def test_a_wide_kernel_is_one_chain_of_three(
    kind: type[nn.Module], r: tuple[int, int], tmp_path: Path
) -> None:
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]  # type: ignore[index]
    base = nn.Sequential(kind(6, 8, 3, stride=2, padding=1, groups=2)).double()
    fresh = nn.Sequential(kind(6, 8, 3, stride=2, padding=1, groups=2)).double()
    fresh.load_state_dict(base.state_dict())
    options = {"r": [*r, *(2,) * axes], "target_modules": ["0"], "init_weights": False}
    model = graftune.wrap(base, "flora", **options)
    export_locon(model, tmp_path / "locon.safetensors")
    tensors = load_file(tmp_path / "locon.safetensors")
    shapes = {name.removeprefix("lycoris_0."): tuple(t.shape) for name, t in tensors.items()}
    one, three, rank = (1,) * axes, (3,) * axes, max(r)
    assert shapes == {
        "lora_up.weight": (8, rank, *one),
        "lora_down.weight": (rank, 3, *one),
        "lora_mid.weight": (rank, rank, *three),
        "alpha": (),
    }
    x = torch.randn(2, 6, *(5,) * axes, dtype=torch.float64)
    adapted = with_lycoris(tmp_path / "locon.safetensors", fresh)
    torch.testing.assert_close(adapted(x), model(x), rtol=0, atol=1e-12)


def test_kohyas_names_for_a_unet(tmp_path: Path) -> None:
    case = MODELS["diffusers-unet"]
    model = flora(case, **UNEQUAL["diffusers-unet"])
    file = tmp_path / "style.safetensors"
    export_locon(model, file)
    assert all(name.startswith("lora_unet_") for name in load_file(file))
    unet = case.build()
    # It first makes layers for everything, and its own targets overlap on a UNet this small.
    lycoris.kohya.LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    network, _ = lycoris.kohya.create_network_from_weights(1.0, str(file), None, None, unet)
    network.apply_to(None, unet, apply_text_encoder=False, apply_unet=True)
    assert_same(case, unet.eval(), model, 1e-5)


def test_diffusers_loads_what_has_no_wide_kernels(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    case = MODELS["diffusers-unet"]
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv_shortcut"]
    model = flora(case, target_modules=targets, rank_pattern={"to_q": 2})
    export_locon(model, tmp_path / "style.safetensors")
    unet = case.build()
    parts = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    pipeline = StableDiffusionPipeline(
        unet=unet, requires_safety_checker=False, **dict.fromkeys(parts)
    )
    pipeline.load_lora_weights(str(tmp_path / "style.safetensors"))
    assert_same(case, unet, model, 1e-5)


def test_a_text_encoder_has_kohyas_name(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config.num_hidden_layers, config.vocab_size = 1, 8
    model = graftune.wrap(CLIPTextModel(config), "flora", r=2, target_modules=["q_proj"])
    export_locon(model, tmp_path / "text.safetensors")
    (name,) = {name.partition(".")[0] for name in load_file(tmp_path / "text.safetensors")}
    assert name.startswith("lora_te_")
    assert name.endswith("encoder_layers_0_self_attn_q_proj")


def test_the_nearest_of_a_rank(tmp_path: Path) -> None:
    case = MODELS["timm-convnext"]
    config = peft.LoHaConfig(r=2, alpha=16, target_modules=["conv_dw", "fc1"], init_weights=False)
    model = peft.get_peft_model(case.build(), config)
    file = tmp_path / "locon.safetensors"
    with pytest.raises(ValueError, match=r"no exact low rank: give `rank=`"):
        export_locon(model, file)
    assert not file.exists()
    near, exact = export_locon(model, file, rank=1), export_locon(model, file, rank=64)
    assert 0 < near.error < 1
    assert not near.exact
    assert exact.exact
    assert_same(case, with_lycoris(file, case.build()), model, 1e-5)


def shadowed() -> nn.Module:
    """Two modules whose names are one when their dots are underscores."""
    return nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), {}, "calls no layer"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), {}, "no form for ConvTranspose1d"),
        (lambda: nn.Sequential(nn.Embedding(5, 4)), {}, "no form for Embedding"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
            {},
            "pads with zeros only",
        ),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
            {"target_modules": None, "target_parameters": ["0.in_proj_weight"]},
            "calls no layer",
        ),
        (MODELS["transformers-gpt2"].build, {"target_modules": ["c_attn"]}, "form for Conv1D"),
        (
            MODELS["transformers-vit"].build,
            {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
            "modules are trained in full",
        ),
        (shadowed, {"target_modules": ["a.b"]}, "'lycoris_a_b' would mean several modules"),
    ],
)
@pytest.mark.filterwarnings("ignore:the adapter has at least as many numbers")
def test_what_a_locon_cannot_be(
    make: Callable[[], nn.Module], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    options = {"target_modules": ["0"], "r": 2, "init_weights": False} | options
    model = graftune.wrap(make(), "flora", **options)
    for rank in (None, 2):
        with pytest.raises(ValueError, match=reason):
            export_locon(model, tmp_path / "locon.safetensors", rank=rank)
    assert not any(tmp_path.iterdir())


def test_the_file_has_to_be_a_safetensors_file(tmp_path: Path) -> None:
    model = flora(MODELS["timm-vit"])
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_locon(model, tmp_path / "locon.pt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_locon(model, tmp_path / "folder.safetensors")
