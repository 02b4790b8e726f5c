"""What is saved: values and a proof of their places, or the places themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import graftune
from graftune import SaraConfig
from graftune.adapters.base.sparse_parts import sparse_parts

FILE = "adapter_model.safetensors"


def net(width: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 30), nn.Linear(30, 4))


def saved(folder: Path, **options: Any) -> PeftModel:
    model = graftune.wrap(net(), "sara", **({"fraction": 0.2, "init_weights": False} | options))
    model.save_pretrained(folder)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.numel())
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(3, 20, generator=generator).to(dtype)).detach()


def test_the_file_has_values_by_name_and_a_proof(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tensors = load_file(tmp_path / FILE)
    values = {n: t for n, t in tensors.items() if ".sara_values." in n}
    proofs = {n: t for n, t in tensors.items() if n.endswith(".sara_places")}
    assert set(values) | set(proofs) == set(tensors)
    assert {t.dtype for t in proofs.values()} == {torch.int64}
    expected = {part.name.replace(".default", ""): part.values for part in sparse_parts(model)}
    assert expected.keys() == values.keys()
    assert all(torch.equal(tensor, values[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("select", ["smallest", "largest", "random"])
@pytest.mark.parametrize("store_indices", [False, True])
def test_every_selection_is_found_again(tmp_path: Path, select: str, store_indices: bool) -> None:
    model = saved(tmp_path, select=select, store_indices=store_indices, seed=3)
    loaded = graftune.load(net(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / FILE) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path / "proof")
    with pytest.raises(graftune.BaseModelMismatchError, match=str(dtype).removeprefix("torch.")):
        graftune.load(net().to(dtype), tmp_path / "proof")
    model = saved(tmp_path / "stored", store_indices=True)
    loaded = graftune.load(net().to(dtype), tmp_path / "stored")
    torch.testing.assert_close(outputs(loaded).float(), outputs(model), rtol=0.05, atol=0.05)
    low = PeftModel.from_pretrained(net(), str(tmp_path / "stored"), low_cpu_mem_usage=True)
    assert torch.equal(outputs(low), outputs(model))


def test_another_revision_is_refused_by_name(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = net()
    with torch.no_grad():
        other[2].weight.add_(0.01 * torch.randn_like(other[2].weight))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(graftune.BaseModelMismatchError, match="another base model"):
        graftune.load(other, tmp_path)
    for check in ("warn", "off"):
        with pytest.raises(graftune.BaseModelMismatchError, match=r"other places .*\('2'\)"):
            graftune.load(other, tmp_path, check_base=check)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    # One weight that changes sides is enough: sampled values do not tell.
    other = net()
    part = next(iter(sparse_parts(model)))
    index = int(part.dense(torch.ones_like(part.values)).flatten().nonzero()[0])
    with torch.no_grad():
        other[0].weight.view(-1)[index] = 1.0
    with pytest.raises(graftune.BaseModelMismatchError, match=r"other places .*\('0'\)"):
        graftune.load(other, tmp_path, check_base="off")


@pytest.mark.parametrize("store_indices", [False, True])
def test_another_threshold_is_refused(tmp_path: Path, store_indices: bool) -> None:
    first = saved(tmp_path, fraction=0.2, store_indices=store_indices)
    state = load_file(tmp_path / FILE)
    model = graftune.wrap(net(), "sara", fraction=0.25)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"fraction=0.25.*same threshold"):
        peft.set_peft_model_state_dict(model, state)
    with pytest.raises(ValueError, match=r"fraction=0.25.*same threshold"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(outputs(model), before)
    # The same selection is taken into the parameters that an optimizer may hold.
    again = graftune.wrap(net(), "sara", fraction=0.2, store_indices=store_indices)
    parameters = [id(p) for p in again.parameters()]
    peft.set_peft_model_state_dict(again, state)
    assert torch.equal(outputs(again), outputs(first))
    assert [id(p) for p in again.parameters()] == parameters


def test_values_without_places_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    values = {n: t for n, t in load_file(tmp_path / FILE).items() if "sara_places" not in n}
    with pytest.raises(ValueError, match="do not say where their entries are"):
        peft.set_peft_model_state_dict(model, values)


def test_injected_without_a_peft_model(tmp_path: Path) -> None:
    """As diffusers and transformers hold adapters: layers in their own model, no prefix."""
    model = saved(tmp_path)
    state = get_peft_model_state_dict(model)
    other = net()
    peft.inject_adapter_in_model(SaraConfig(fraction=0.2), other)
    other.peft_config = {"default": SaraConfig(fraction=0.2)}
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_bytes_beside_those_of_shira(tmp_path: Path, share: float) -> None:
    """At equal numbers: the values, hardly more; SHiRA's file has eight bytes of indices each."""

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(400, 500, bias=False), nn.Linear(500, 400, bias=False))

    count = int(share * 400 * 500)
    model = graftune.wrap(wide(), "sara", num_parameters=2 * count)
    model.save_pretrained(tmp_path / "sara")
    stored = graftune.wrap(wide(), "sara", num_parameters=2 * count, store_indices=True)
    stored.save_pretrained(tmp_path / "stored")
    shira = get_peft_model(wide(), ShiraConfig(r=count // 900, target_modules=["0", "1"]))
    shira.save_pretrained(tmp_path / "shira")
    sizes = {n: (tmp_path / n / FILE).stat().st_size for n in ("sara", "stored", "shira")}
    ours = sum(part.values.numel() for part in sparse_parts(model))
    theirs = sum(p.numel() for p in shira.parameters() if p.requires_grad)
    assert sizes["sara"] <= 1.05 * 4 * ours
    assert sizes["stored"] <= 1.05 * (4 * ours + min(400 * 500 * 2 / 8, 4 * ours))
    assert sizes["shira"] >= 11.9 * theirs
