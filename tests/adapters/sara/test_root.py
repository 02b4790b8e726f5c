"""Parameters that the model itself owns, as a timm ViT its position embedding, are trained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

import graftune
from graftune.adapters.sara import SaraConfig, SaraLayer, SaraRoot
from graftune.integrations.sharing.export import export_merged
from support.models import MODELS

TIMM, OPEN_CLIP = MODELS["timm-vit"], MODELS["open_clip-vit"]


class Scaled(nn.Module):
    """A layer and two parameters of its own, one of which is read outside of `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.linspace(-0.03, 0.02, 6))
        self.shift = nn.Parameter(torch.linspace(0.01, 0.06, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.shift

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.shift


def wrap(model: nn.Module, **options: Any) -> Any:
    given = {"fraction": 0.3, "init_weights": False, "regularizers": [], **options}
    return graftune.wrap(model, "sara", **given)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The values of the root's parameters, by the parameters' names."""
    found = {n: p for n, p in model.named_parameters() if "own_parameters" in n}
    return {name.rpartition(".")[2]: values for name, values in found.items()}


def test_a_position_embedding_learns_however_it_is_read() -> None:
    base, x = TIMM.build().eval(), TIMM.inputs(2)
    model = wrap(base)
    assert {"pos_embed", "cls_token"} <= set(values_of(model))
    with model.disable_adapter():
        plain = model.forward_features(x["x"]).detach()
    features = model.forward_features(x["x"])
    assert not torch.allclose(features, plain)
    features.square().sum().backward()
    assert all(values.grad.any() for values in values_of(model).values())


def test_open_clips_texts_are_read_past_forward() -> None:
    base, inputs = OPEN_CLIP.build().eval(), OPEN_CLIP.inputs(2)
    model = wrap(base, target_parameters=["positional_embedding"])
    assert "positional_embedding" in values_of(model)
    model.encode_text(inputs["text"]).square().sum().backward()
    assert values_of(model)["positional_embedding"].grad.any()


@pytest.mark.filterwarnings("error:You have passed exclude_modules")
def test_named_alone_and_left_out() -> None:
    model = wrap(Scaled(), target_parameters=["shift"], fraction=0.5)
    assert list(values_of(model)) == ["shift"]
    assert not any(isinstance(module, SaraLayer) for module in model.modules())
    model = wrap(Scaled(), exclude_modules=["scale"], fraction=0.9)
    assert list(values_of(model)) == ["shift"]
    assert values_of(wrap(Scaled(), target_modules=["layer"])) == {}


def test_the_model_stays_what_it_is() -> None:
    base, x = Scaled(), torch.ones(2, 6)
    expected, cls = base(x).detach(), type(base)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = wrap(base)
    assert isinstance(base, Scaled)
    assert (type(base).__name__, type(base).__module__) == (cls.__name__, cls.__module__)
    assert torch.equal(base._parameters["shift"], state["shift"])  # never written to
    assert not torch.equal(base.shift, state["shift"])
    output = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), output)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    bare = model.unload()
    assert bare is base
    assert type(bare) is cls
    assert bare.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in bare.state_dict().items())


def test_merged_into_a_bare_model() -> None:
    model, x = wrap(Scaled()), torch.ones(2, 6)
    output = model(x)
    bare = model.merge_and_unload()
    assert type(bare) is Scaled
    assert SaraRoot.of(bare) is None
    torch.testing.assert_close(bare(x), output)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(again: Any) -> None:
    model, x = wrap(Scaled()), torch.ones(2, 6)
    copied = again(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        for values in values_of(copied).values():
            values.add_(1)
    assert not torch.equal(copied.shifted(x), model.shifted(x))
    assert type(copied.unload()) is Scaled
    assert type(model.get_base_model()) is not Scaled  # still adapted


@pytest.mark.parametrize("store_indices", [False, True])
def test_saved_and_loaded(tmp_path: Path, store_indices: bool) -> None:
    torch.manual_seed(0)
    base, x = Scaled(), torch.ones(2, 6)
    model = wrap(copy.deepcopy(base), store_indices=store_indices)
    model.save_pretrained(tmp_path)
    loaded = graftune.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), model(x))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.shift.add_(0.5)
    with pytest.raises(graftune.BaseModelMismatchError):
        graftune.load(other, tmp_path)


def test_a_failed_attachment_leaves_the_class(tmp_path: Path) -> None:
    wrap(Scaled()).save_pretrained(tmp_path)
    other = Scaled()
    with torch.no_grad():
        other.layer.weight.add_(1)
    with pytest.raises(graftune.BaseModelMismatchError):
        graftune.load(other, tmp_path)
    assert type(other) is Scaled
    assert SaraRoot.of(other) is None


def test_two_adapters() -> None:
    model, x = wrap(Scaled()), torch.ones(2, 6)
    first = model(x)
    model.add_adapter("other", SaraConfig(fraction=0.5, init_weights=False))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    assert not torch.equal(model(x), first)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


def test_attached_without_a_peft_model() -> None:
    base, x = Scaled(), torch.ones(2, 6)
    expected = base(x).detach()
    inject_adapter_in_model(SaraConfig(fraction=0.3), base)
    assert torch.equal(base(x), expected)
    base(x).sum().backward()
    assert all(values.grad is not None for values in values_of(base).values())


def test_exported_merged(tmp_path: Path) -> None:
    model, x = wrap(Scaled()), torch.ones(2, 6)
    export_merged(model, tmp_path)
    from safetensors.torch import load_file

    bare = Scaled()
    bare.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(bare(x), model(x))
    assert SaraRoot.of(model.get_base_model()) is not None


class Chain(nn.Sequential):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6))
        self.shift = nn.Parameter(torch.zeros(6))


def test_a_containers_own_parameters_have_no_place() -> None:
    with pytest.warns(UserWarning, match="leaves out 'shift'.*Chain runs"):
        model = wrap(Chain())
    assert values_of(model) == {}
    base = Chain()
    with pytest.raises(ValueError, match=r"cannot train 'shift' in part.*Chain"):
        wrap(base, target_parameters=["shift"])
    assert type(base) is Chain
