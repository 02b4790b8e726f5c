"""`graftune.load`: every way in which a saved adapter can be wrong is one clear error."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftune
from support.models import MODELS
from support.untouched import assert_untouched, snapshot

CASE = MODELS["transformers-vit"]
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = graftune.wrap(CASE.build(), "flora", r=2, init_weights=False)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


def truncate(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def scramble_header(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[:40] = bytes(range(200, 240))
    (folder / TENSORS).write_bytes(bytes(content))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0].replace("layers.0", "layers.7")] = torch.ones(2)


def widen_one(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.ones(5, 5)


def spoil_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]].fill_(torch.nan)


def hollow(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.empty(0)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (truncate, ValueError, "truncated or corrupt"),
        (scramble_header, ValueError, "truncated or corrupt"),
        (lambda f: (f / TENSORS).write_bytes(b""), ValueError, "truncated or corrupt"),
        (to_pickle, ValueError, "pickle"),
        (lambda f: (f / TENSORS).unlink(), FileNotFoundError, TENSORS),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, "not an adapter's config"),
        (lambda f: edit_config(f, peft_type="FLORAX"), ValueError, "Did you mean 'FLORA'"),
        (lambda f: edit_tensors(f, dict.clear), ValueError, "empty"),
        (lambda f: edit_tensors(f, hollow), ValueError, "empty"),
        (lambda f: edit_tensors(f, drop_one), graftune.AdapterMismatchError, "1 missing"),
        (lambda f: edit_tensors(f, add_one), graftune.AdapterMismatchError, "no place for"),
        (lambda f: edit_tensors(f, widen_one), graftune.AdapterMismatchError, "another shape"),
        (lambda f: edit_tensors(f, spoil_one), ValueError, "NaN or infinity"),
        (lambda f: edit_config(f, r=3), graftune.AdapterMismatchError, "another shape"),
        (lambda f: edit_config(f, target_modules=["fc9"]), ValueError, "fc9"),
    ],
)
def test_a_spoilt_adapter_is_one_error_and_leaves_the_base_alone(
    folder: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    spoil(folder)
    base = CASE.build()
    before = snapshot(base)
    with pytest.raises(error, match=message):
        graftune.load(base, folder)
    assert_untouched(base, before)


def test_no_such_place() -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        graftune.load(CASE.build(), "./no/such/folder")


def test_a_repository_id_is_read_through_the_hub_client(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client finds the files in its cache, laid out as it lays them out; no server is asked."""
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = cache / "models--user--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    loaded = graftune.load(CASE.build(), "user/adapter", cache_dir=cache)
    expected = graftune.load(CASE.build(), folder)
    assert torch.equal(CASE.run(loaded, CASE.batch()), CASE.run(expected, CASE.batch()))
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        graftune.load(CASE.build(), "user/other", cache_dir=cache)
    (repository / "snapshots" / commit / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        graftune.load(CASE.build(), "user/adapter", cache_dir=cache)


def test_another_architecture_is_refused_by_name(folder: Path) -> None:
    base = MODELS["timm-vit"].build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"adapter|targeted"):
        graftune.load(base, folder)
    assert_untouched(base, before)


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'revision'"):
        graftune.load(CASE.build(), folder, revison="main")
    with pytest.raises(ValueError, match="check_base is"):
        graftune.load(CASE.build(), folder, check_base="maybe")  # type: ignore[arg-type]


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    model = graftune.wrap(CASE.build(), "flora", adapter_name="style", r=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="'style'"):
        graftune.load(CASE.build(), tmp_path)
    loaded = graftune.load(CASE.build(), tmp_path, subfolder="style")
    assert list(loaded.peft_config) == ["default"]


def test_a_second_adapter_is_loaded_beside_the_first(folder: Path) -> None:
    model = graftune.load(CASE.build(), folder)
    expected = CASE.run(model, CASE.batch())
    assert graftune.load(model, folder, adapter_name="again") is model
    assert sorted(model.peft_config) == ["again", "default"]
    model.set_adapter("again")
    assert torch.equal(CASE.run(model, CASE.batch()), expected)
    with pytest.raises(ValueError, match="already has an adapter"):
        graftune.load(model, folder, adapter_name="again")


def test_training_goes_on_when_asked(folder: Path) -> None:
    model = graftune.load(CASE.build(), folder, is_trainable=True)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_peft_loads_and_is_checked_too(tmp_path: Path) -> None:
    model = graftune.wrap(CASE.build(), peft.LoraConfig(r=2, init_lora_weights=False))
    expected = CASE.run(model, CASE.batch())
    model.save_pretrained(tmp_path)
    loaded = graftune.load(CASE.build(), tmp_path)
    assert torch.equal(CASE.run(loaded, CASE.batch()), expected)
    edit_tensors(tmp_path, drop_one)
    base = CASE.build()
    before = snapshot(base)
    with pytest.raises(graftune.AdapterMismatchError, match="1 missing"):
        graftune.load(base, tmp_path)
    assert_untouched(base, before)


def test_peft_itself_never_loads_half_an_adapter(folder: Path) -> None:
    edit_tensors(folder, drop_one)
    with pytest.raises(graftune.AdapterMismatchError, match="1 missing"):
        peft.PeftModel.from_pretrained(CASE.build(), str(folder))


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_adapter_is_never_written(tmp_path: Path, empty: bool) -> None:
    model = graftune.wrap(CASE.build(), "flora", r=2)
    # What a sharded run leaves outside its gathering context.
    state = {
        name: torch.empty(0) if ".flora_" in name else tensor
        for name, tensor in model.state_dict().items()
        if not (empty and ".flora_" in name)
    }
    with pytest.raises(ValueError, match="nothing was written"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / TENSORS).exists()


def test_a_quantised_base_is_not_compared_and_said_so_once(folder: Path) -> None:
    base = CASE.build()
    nn.init.zeros_(base.vit.embeddings.cls_token)
    model = graftune.wrap(base, "flora", r=2)
    layer = next(m for m in model.modules() if hasattr(m, "flora_core"))
    weight = layer.get_base_layer().weight
    assert weight.is_floating_point()
    from graftune.adapters.base.tuner import digest_of_targets

    quantised = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    layer.get_base_layer().weight = quantised
    with pytest.warns(UserWarning, match="quantised"):
        assert digest_of_targets(model, "default") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert digest_of_targets(model, "default") is None
