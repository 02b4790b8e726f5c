"""What must hold for every method on every family."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import graftune
from support.methods import PAIRS, MethodCase
from support.models import MODELS, ModelCase, loss

# Each layer type once: compiling takes seconds.
COMPILED = ("transformers-gpt2", "open_clip-vit", "diffusers-unet", "torch-cnn")

pytestmark = pytest.mark.parametrize(
    ("method", "family"), PAIRS, ids=[f"{method.name}-{family}" for method, family in PAIRS]
)


@pytest.fixture(autouse=True)
def no_fused_attention() -> Iterator[None]:
    """PyTorch's fused inference path rounds differently, and not every wrapped layer takes it."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def case(family: str) -> ModelCase:
    return MODELS[family]


def output(case: ModelCase, model: nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return case.run(model, case.batch(seed=seed))


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1.0))


def assert_differ(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def adapter_state(model: peft.PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=adapter_name)


def test_starts_as_the_base_model(method: MethodCase, case: ModelCase) -> None:
    if not method.starts_as_base:
        pytest.skip("the method changes the output from the start")
    base = case.build()
    expected = output(case, base)
    assert_near(output(case, method.wrap(base)), expected, 1e-6)


def test_gradient_reaches_the_adapter_and_nothing_else(method: MethodCase, case: ModelCase) -> None:
    model = method.wrap_trained(case.build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    prefix = method.prefix or f"{method.name}_"
    assert all(f".{prefix}" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e3)
    loss(case.run(model, case.batch())).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable
    learning = {name for name in trainable if not any(t in name for t in method.from_terms)}
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert parameter.grad is not None
            assert parameter.grad.any() == (name in learning), name
    optimizer.step()
    # A state dict has the base model's own weights, whatever they hold while an adapter runs.
    after = model.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert {n for n in names if not torch.equal(after[n], before[n])} == learning


def test_saved_and_loaded_is_equal_bit_for_bit(
    method: MethodCase, case: ModelCase, tmp_path: Path
) -> None:
    model = method.wrap_trained(case.build())
    expected, state = output(case, model), adapter_state(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for load in (
        lambda base: graftune.load(base, tmp_path),
        lambda base: peft.PeftModel.from_pretrained(base, str(tmp_path)),
        lambda base: peft.PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=True),
    ):
        loaded = load(case.build())
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(p.is_meta for p in loaded.parameters())
        assert_equal(output(case, loaded), expected)
        again = adapter_state(loaded)
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            assert_equal(again[name], tensor)


def test_disabled_is_the_base_model(method: MethodCase, case: ModelCase) -> None:
    base = case.build()
    expected = output(case, base)
    model = method.wrap_trained(base)
    adapted = output(case, model)
    assert_differ(adapted, expected)
    with model.disable_adapter():
        assert_near(output(case, model), expected, 1e-6)
    assert_equal(output(case, model), adapted)


def test_merged_equals_unmerged_and_unmerging_is_exact(method: MethodCase, case: ModelCase) -> None:
    if not method.merges:
        pytest.skip("the method does not merge")
    model = method.wrap_trained(case.build())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = output(case, model)
    model.merge_adapter(safe_merge=True)
    assert_near(output(case, model), expected, method.merge_tolerance)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, state[name])
    assert_equal(output(case, model), expected)


def test_merge_and_unload_and_unload_give_the_bare_model_back(
    method: MethodCase, case: ModelCase
) -> None:
    # Frozen as the unloaded one is: attention kernels are chosen by requires_grad, too.
    original = case.build().requires_grad_(False)
    names = [name for name, _ in original.named_modules()]
    state = copy.deepcopy(original.state_dict())

    unloaded = method.wrap_trained(case.build()).unload()
    assert type(unloaded) is type(original)
    assert [name for name, _ in unloaded.named_modules()] == names
    assert unloaded.state_dict().keys() == state.keys()
    for name, tensor in unloaded.state_dict().items():
        assert_equal(tensor, state[name])
    assert_equal(output(case, unloaded), output(case, original))

    model = method.wrap_trained(case.build())
    expected = output(case, model)
    if not method.merges:
        with pytest.raises(ValueError, match="nothing to merge"):
            model.merge_and_unload()
        assert_equal(output(case, model), expected)
    else:
        merged = model.merge_and_unload()
        assert [name for name, _ in merged.named_modules()] == names
        assert_near(output(case, merged), expected, method.merge_tolerance)


def test_two_adapters_are_independent(method: MethodCase, case: ModelCase) -> None:
    model = method.wrap_trained(case.build())
    first = output(case, model)
    method.wrap(model, "second", init_weights=False)
    assert_equal(output(case, model), first)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name:
                parameter.copy_(1.5 * parameter.roll(1))
    model.set_adapter("second")
    second = output(case, model)
    assert_differ(second, first)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".second" in name for name in trainable)
    model.set_adapter("default")
    assert_equal(output(case, model), first)
    model.delete_adapter("second")
    assert_equal(output(case, model), first)
    assert not [name for name in model.state_dict() if "second" in name]
    for module in model.modules():
        for value in vars(module).values():
            assert not (isinstance(value, dict) and "second" in value)


def test_two_adapters_merge_together(method: MethodCase, case: ModelCase) -> None:
    if not method.merges:
        pytest.skip("the method does not merge")
    model = method.wrap_trained(case.build())
    method.wrap(model, "second", init_weights=False)
    model.base_model.set_adapter(["default", "second"])
    expected = output(case, model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    one_by_one = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_near(output(case, model), expected, method.merge_tolerance)
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, one_by_one[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(method: MethodCase, case: ModelCase, dtype: torch.dtype) -> None:
    base = case.build().to(dtype)
    model = method.wrap_trained(base)
    kept = dtype if dtype is torch.float64 else torch.float32
    adapter = [p for name, p in model.named_parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {kept}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.batch().items()}
    result = case.run(model, batch)
    assert result.dtype == dtype
    loss(result).backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter if p.grad is not None)
    if method.merges:
        before = {name: t.clone() for name, t in base.state_dict().items()}
        model.merge_adapter()
        assert {t.dtype for t in base.state_dict().values() if t.is_floating_point()} >= {dtype}
        merged = case.run(model, batch)
        assert_near(merged.double(), result.detach().double(), 0.2 if kept != dtype else 1e-9)
        model.unmerge_adapter()
        for name, tensor in base.state_dict().items():
            assert_equal(tensor, before[name])


def test_autocast(method: MethodCase, case: ModelCase) -> None:
    model = method.wrap_trained(case.build())
    expected = output(case, model)
    with torch.autocast("cpu", torch.bfloat16):
        result = case.run(model, case.batch())
    loss(result).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
    assert_near(result.detach().float(), expected, 0.1)


def test_gradient_checkpointing_gives_the_same_gradients(
    method: MethodCase, case: ModelCase
) -> None:
    model = method.wrap_trained(case.build()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = case.batch()
    torch.manual_seed(0)  # diffusers' DiT drops labels at random
    loss(case.run(model, batch)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base = model.get_base_model()
    if hasattr(base, "gradient_checkpointing_enable"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    elif hasattr(base, "set_grad_checkpointing"):
        base.set_grad_checkpointing(True)
    elif hasattr(base, "enable_gradient_checkpointing"):
        base.enable_gradient_checkpointing()
    else:
        pytest.skip("the model offers no gradient checkpointing")
    torch.manual_seed(0)
    loss(case.run(model, batch)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert_near(parameter.grad, expected[name])


def test_compiled_equals_eager(method: MethodCase, family: str, case: ModelCase) -> None:
    if family not in COMPILED:
        pytest.skip("compiled in another family of the same layers")
    torch.compiler.reset()
    model = method.wrap_trained(case.build())
    expected = output(case, model)
    # The graph is what is tested, not the machine code that would be made of it.
    compiled = torch.compile(model, backend="aot_eager")
    result = case.run(compiled, case.batch())
    assert_near(result.detach(), expected)
    loss(result).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copied_and_pickled(method: MethodCase, case: ModelCase) -> None:
    model = method.wrap_trained(case.build())
    expected = output(case, model)
    assert_equal(output(case, copy.deepcopy(model)), expected)
    assert_equal(output(case, pickle.loads(pickle.dumps(model))), expected)


def test_other_copies_of_the_base_are_recognised_and_other_bases_refused(
    method: MethodCase, case: ModelCase, tmp_path: Path
) -> None:
    method.wrap_trained(case.build()).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        if not method.needs_own_base:
            graftune.load(case.build().to(dtype), tmp_path)
            continue
        with pytest.raises(graftune.BaseModelMismatchError, match=f"{dtype}"[6:]):
            graftune.load(case.build().to(dtype), tmp_path)

    other = case.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    state = copy.deepcopy(other.state_dict())
    modules = [(name, type(module)) for name, module in other.named_modules()]
    with pytest.raises(graftune.BaseModelMismatchError, match="another base model"):
        graftune.load(other, tmp_path)
    assert [(name, type(module)) for name, module in other.named_modules()] == modules
    assert all(p.requires_grad for p in other.parameters())
    for name, tensor in other.state_dict().items():
        assert_equal(tensor, state[name])
    if method.needs_own_base:
        for check in ("warn", "off"):
            with pytest.raises(graftune.BaseModelMismatchError, match="other places"):
                graftune.load(copy.deepcopy(other), tmp_path, check_base=check)
        return
    with pytest.warns(UserWarning, match="another base model"):
        graftune.load(copy.deepcopy(other), tmp_path, check_base="warn")
    with pytest.warns(UserWarning, match="another base model"):
        peft.PeftModel.from_pretrained(copy.deepcopy(other), str(tmp_path))
    graftune.load(other, tmp_path, check_base="off")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(method: MethodCase, case: ModelCase) -> None:
    model = method.wrap_trained(case.build())
    expected = output(case, model)
    model = model.cuda()
    batch = {name: tensor.cuda() for name, tensor in case.batch().items()}
    assert_near(case.run(model, batch).detach().cpu(), expected, 1e-3)
    later = method.wrap_trained(case.build().cuda())
    assert {p.device.type for p in later.parameters()} == {"cuda"}
