"""Masks without their method: merged into the base model, and as a difference of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graftune
from graftune.integrations.sharing.export import apply_difference, export_difference, export_merged
from support.models import MODELS


@pytest.mark.parametrize("family", ["open_clip-vit", "open_clip-resnet", "transformers-clip"])
def test_merged_and_difference_are_the_masked_model(family: str, tmp_path: Path) -> None:
    case = MODELS[family]
    model = graftune.wrap(case.build(), "mask_tuning", init_weights=False)
    model.eval()
    with torch.no_grad():
        expected = case.run(model, case.batch())
        export_merged(model, tmp_path / "merged")
        report = export_difference(model, tmp_path / "difference.safetensors")
        assert torch.equal(case.run(model, case.batch()), expected)
        bare = case.build()
        state = load_file(tmp_path / "merged" / "model.safetensors")
        _, unexpected = bare.load_state_dict(state, strict=False)
        assert not unexpected
        torch.testing.assert_close(case.run(bare, case.batch()), expected)
        changed = apply_difference(case.build(), tmp_path / "difference.safetensors")
        torch.testing.assert_close(case.run(changed, case.batch()), expected)
    assert len(load_file(report.files[0])) == sum(p.requires_grad for p in model.parameters())


def test_a_base_in_half_precision_keeps_its_type(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    weight = base[0].weight.detach().clone()
    model = graftune.wrap(base, "mask_tuning", init_weights=False)
    mask = model.base_model.model[0].mask("default", "weight")
    export_merged(model, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")["0.weight"]
    assert torch.equal(merged, weight * mask)
