"""Half precision computes; what is trained, kept and resumed is in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graftune
from graftune.adapters.regularizers import Regularization
from support.models import MODELS, SmallCNN
from support.training import (
    Opposing,
    arguments,
    colour_run,
    losses,
    sentences,
    weights,
    with_state,
)

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def assert_float32(run: Any, folder: Path) -> None:
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    for number in (2, 4):
        tensors = load_file(folder / f"checkpoint-{number}" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["flora", "lora"])
def test_bf16_autocast_and_resuming(method: str, tmp_path: Path) -> None:
    def run(folder: Path, **overrides: Any) -> graftune.Trainer:
        chosen = with_state()
        return colour_run(folder, regularizers=chosen, method=method, **SAVING, **overrides)

    whole, exact = run(tmp_path / "whole", bf16=True), run(tmp_path / "exact")
    whole.train()
    exact.train()
    assert losses(whole) != losses(exact)
    # Later steps start from other weights.
    assert losses(whole)[0] == pytest.approx(losses(exact)[0], rel=0.01)
    assert_float32(whole, tmp_path / "whole")
    resumed = run(tmp_path / "resumed", bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert {p.dtype for p in weights(resumed).values()} == {torch.float32}
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())


@pytest.mark.parametrize("method", ["flora", "lora"])
def test_a_base_model_in_bf16_gets_an_adapter_in_float32(method: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    def run(folder: Path) -> graftune.Trainer:
        torch.manual_seed(1)
        base = MODELS["transformers-llama"].build().to(torch.bfloat16)
        config: Any = LoraConfig(r=4) if method == "lora" else graftune.FloraConfig(r=4)
        return graftune.Trainer(
            graftune.wrap(base, config),
            arguments(folder, bf16=True, **SAVING),
            objective=graftune.CausalLM(),
            train_dataset=sentences(16),
            regularizers=[graftune.FrozenDistillation(), graftune.L2ToStart(of="merged")],
        )

    whole = run(tmp_path)
    whole.train()
    assert_float32(whole, tmp_path)
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_float32(whole, tmp_path)
    assert {p.dtype for p in weights(resumed).values()} == {torch.float32}
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())
    frozen = {p.dtype for p in resumed.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


class Mean(nn.Module):
    """An objective without labels: the mean of the logits' squares."""

    def forward(self, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = model(x)
        return {"logits": logits, "loss": (logits - 1).square().mean()}


def scaled_gradients(scaler: torch.amp.GradScaler | None) -> dict[str, torch.Tensor]:
    """Gradients after one step's transform, in a bare loop, accumulated over two batches."""
    torch.manual_seed(0)
    model = graftune.wrap(SmallCNN(), "flora", r=2, init_weights=False)
    chosen = [Opposing(), graftune.L2ToStart(0.1), graftune.GradientDropout(0.5)]
    regularization = Regularization(model, chosen)
    regularization.start(steps=1, epochs=1)
    batches = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    scale = scaler.get_scale() if scaler else 1.0
    for x in batches:
        outputs = regularization(Mean(), model, {"x": x}, share=0.5, gradient_scale=scale)
        loss = outputs["loss"] - 0.5 * outputs["task_loss"]  # the task's share of two batches
        (scaler.scale(loss) if scaler else loss).backward()
    regularization.transform_gradients(scale)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    if scaler:
        scaler.unscale_(optimizer)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_gradient_scaler_changes_nothing_but_the_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(torch.ones(()))  # a scaler has its scale from its first use on
    exact, scaled = scaled_gradients(None), scaled_gradients(scaler)
    assert exact.keys() == scaled.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(scaled[name], gradient, rtol=1e-5, atol=1e-7)
