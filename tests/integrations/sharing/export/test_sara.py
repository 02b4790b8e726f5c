"""SaRA in other forms: not a LoRA, the nearest one with its error said, and exactly elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import graftune
from graftune.adapters.base.weights import weight_changes
from graftune.integrations.sharing.export import (
    apply_difference,
    export_difference,
    export_lora,
    export_merged,
)
from support.models import MODELS


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 6))


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    given = {"fraction": 0.2, "init_weights": False, "regularizers": [], **options}
    return graftune.wrap(net(), "sara", **given)


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return model(torch.randn(4, 20, generator=generator)).detach()


def test_it_is_no_lora_and_says_so(tmp_path: Path) -> None:
    weights = {"target_modules": None, "target_parameters": ["0.weight", "2.weight"]}
    with pytest.raises(ValueError, match=r"\(SARA\) is not a LoRA on '0.weight', '2.weight'.*rank"):
        export_lora(adapted(**weights), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"\(SARA\) cannot be exported as a LoRA.*'0.bias'"):
        export_lora(adapted(), tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()


def test_the_nearest_lora_has_the_error_it_says(tmp_path: Path) -> None:
    model = adapted(target_modules=None, target_parameters=["0.weight", "2.weight"])
    report = export_lora(model, tmp_path / "near", rank=3)
    assert not report.exact
    lora = PeftModel.from_pretrained(net(), str(tmp_path / "near"))
    squared = norm = 0.0
    for name, compute in weight_changes(model):
        change = compute().detach()
        module = lora.base_model.model.get_submodule(name.rpartition(".")[0])
        squared += float((module.get_delta_weight("default") - change).square().sum())
        norm += float(change.square().sum())
    assert report.error == pytest.approx((squared / norm) ** 0.5, rel=1e-4)
    assert report.error > 0.1
    whole = export_lora(model, tmp_path / "whole", rank=20)  # as large as the smaller sides
    assert whole.error < 1e-6
    lora = PeftModel.from_pretrained(net(), str(tmp_path / "whole"))
    torch.testing.assert_close(outputs(lora), outputs(model), rtol=1e-4, atol=1e-5)


def test_merged_and_as_a_difference_it_is_exact(tmp_path: Path) -> None:
    model = adapted()
    expected = outputs(model)
    export_difference(model, tmp_path / "difference.safetensors")
    patched = net()
    apply_difference(patched, tmp_path / "difference.safetensors")
    torch.testing.assert_close(outputs(patched), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs(model), expected)


def test_a_merged_folder_is_the_model(tmp_path: Path) -> None:
    case = MODELS["transformers-vit"]
    model = graftune.wrap(case.build(), "sara", fraction=0.2, init_weights=False, regularizers=[])
    export_merged(model, tmp_path / "merged")
    merged = type(case.build()).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            case.run(merged, case.batch()), case.run(model, case.batch()), rtol=1e-4, atol=1e-5
        )
