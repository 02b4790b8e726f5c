"""OnePrompt against the released code's numbers, on timm's vision transformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import graftune

GOLDEN = Path(__file__).parents[3] / "golden" / "ovor_oneprompt_tiny.npz"
LENGTHS = [4, 4, 8, 8, 8]


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    stored = np.load(GOLDEN)
    return {name: torch.from_numpy(stored[name]) for name in stored}


def tiny(arrays: dict[str, torch.Tensor], fused: bool) -> torch.nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=6,
        num_heads=4,
        num_classes=0,
    )
    weights = {n[5:]: t.double() for n, t in arrays.items() if n.startswith("base.")}
    model.double().load_state_dict(weights)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.eval()


@pytest.mark.parametrize("fused", [True, False])
def test_golden(arrays: dict[str, torch.Tensor], fused: bool) -> None:
    model = graftune.wrap(tiny(arrays, fused), graftune.OnePromptConfig(lengths=LENGTHS))
    tokens = {
        number: block.attn.one_prompt.one_prompt_tokens["default"]
        for number, block in enumerate(model.get_base_model().blocks[:5])
    }
    names = {number: f"{'g' if number < 2 else 'e'}_p_{number}" for number in tokens}
    for number, parameter in tokens.items():
        parameter.data.copy_(arrays[f"prompt.{names[number]}"])
    forward = model.get_base_model().forward_features
    result = forward(arrays["images"])
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(result, arrays["tokens_prompted"], **close)
    (result[:, 0] * arrays["loss_weight"]).sum().backward()
    for number, parameter in tokens.items():
        torch.testing.assert_close(parameter.grad, arrays[f"grad.{names[number]}"], **close)
    with model.disable_adapter():
        torch.testing.assert_close(forward(arrays["images"]), arrays["tokens_plain"], **close)
