"""The transformers of diffusion models: wrapped, trained, saved, loaded, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from torch import Tensor, nn

import graftune
from graftune.adapters.base.sparse_parts import sparse_parts


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=12,
        use_additional_conditions=False,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=5,
    )


def _latents() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def _steps() -> Tensor:
    return torch.tensor([3, 700])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "DiT": (
        dit,
        lambda: {
            "hidden_states": _latents(),
            "timestep": _steps(),
            "class_labels": torch.tensor([1, 9]),
        },
    ),
    "PixArt": (
        pixart,
        lambda: {
            "hidden_states": _latents(),
            "timestep": _steps(),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3": (
        sd3,
        lambda: {
            "hidden_states": _latents(),
            "timestep": _steps(),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "pooled_projections": torch.randn(2, 24),
        },
    ),
    "Flux": (
        flux,
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": _steps() / 1000,
            "guidance": torch.ones(2),
            "encoder_hidden_states": torch.randn(2, 5, 32),
            "pooled_projections": torch.randn(2, 24),
            "img_ids": torch.cartesian_prod(*3 * [torch.arange(4.0)])[:16],
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "UNet2D": (
        unet,
        lambda: {
            "sample": torch.randn(2, 3, 8, 8),
            "timestep": _steps(),
            "class_labels": torch.tensor([1, 4]),
        },
    ),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name][0]()
    for parameter in model.parameters():  # some start at zero
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return CASES[name][1]()


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(name)).sample


def train(name: str, model: nn.Module) -> Tensor:
    """Two steps by AdamW with clipped gradients; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = model.train()(**inputs(name)).sample.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", CASES)
def test_trained_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    base = built(name)
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    expected = outputs(name, base)
    model = graftune.wrap(base, "sara", fraction=0.1, regularizers=[])
    torch.testing.assert_close(outputs(name, model), expected, rtol=1e-5, atol=1e-6)
    starts = [part.values.detach().clone() for part in sparse_parts(model)]
    losses = train(name, model)
    assert (losses.diff() < 0).all()
    # Each part learns: no module's path around its layer was missed.
    for part, start in zip(sparse_parts(model), starts, strict=True):
        assert not torch.equal(part.values, start), part.name
    trained = outputs(name, model)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(name, model), expected, rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path)
    loaded = graftune.load(built(name), tmp_path)
    assert torch.equal(outputs(name, loaded), trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(name, merged), trained, rtol=1e-5, atol=1e-6)
    assert merged.state_dict().keys() == state.keys()
    unloaded = model.unload().state_dict()
    assert all(torch.equal(tensor, unloaded[key]) for key, tensor in state.items())
