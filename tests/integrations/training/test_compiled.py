"""A compiled model trains as an eager one, with what regularizers ask of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.training import case_run, losses, weights

REGULARIZED = ["class names, regularized, labels missing", "causal LM, own loss, accumulated"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REGULARIZED)
def test_losses_are_those_of_the_eager_model(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    eager = case_run(name, tmp_path, max_steps=2)
    eager.train()
    compiled = case_run(
        name, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.train()
    assert compiled.accelerator.state.dynamo_plugin.backend.value == "AOT_EAGER"
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    for key, weight in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[key], weight, rtol=1e-4, atol=1e-6)
