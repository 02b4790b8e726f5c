"""The numbers of the authors' released code without its absolute values, through the public API."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graftune
from graftune import ProgressiveRelease, Regularization
from graftune.adapters.sara.functional import outside

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = {f"{m}_{p[0]}": (m, p) for m in ("fc1", "conv", "fc2", "small") for p in ("weight", "bias")}


class Net(nn.Module):
    """The reference's layers; its loss is one of the weights."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(80, 72)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc2 = nn.Linear(72, 66)
        self.small = nn.Linear(20, 10)
        self.double()
        for short, (module, parameter) in NAMES.items():
            getattr(getattr(self, module), parameter).data.copy_(arrays[f"w0_{short}"])


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    found = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "sara_trajectory.npz").items()}
    described = json.loads((GOLDEN / "sara_trajectory.json").read_text())["arrays"]
    assert set(described) == set(found)
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


class Run:
    """The reference's training run on a model of ours."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self.arrays = arrays
        self.model = graftune.wrap(Net(arrays), "sara", threshold=float(arrays["threshold"]))
        self.net = self.model.get_base_model()
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        rates = {name: float(self.arrays[name]) for name in ("lr", "weight_decay")}
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **rates)

    def places(self, short: str) -> object:
        module, parameter = NAMES[short]
        return getattr(self.net, module).places["default"].get(parameter)

    def values(self, short: str) -> Tensor:
        module, parameter = NAMES[short]
        layer = getattr(self.net, module)
        if not layer.adapts(parameter, "default"):
            return torch.zeros(0, dtype=torch.float64)
        return layer.values("default", parameter)

    def loss(self) -> Tensor:
        terms = []
        for short, (module, parameter) in NAMES.items():
            weight = getattr(getattr(self.net, module), parameter)
            terms.append((weight - self.arrays[f"target_{short}"]).square().sum())
        return 0.5 * torch.stack(terms).sum()

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()


def test_selection(arrays: dict[str, Tensor]) -> None:
    run = Run(arrays)
    for short in NAMES:
        mask, places = arrays[f"mask_{short}"], run.places(short)
        if places is None:
            assert not mask.any()
            continue
        assert torch.equal(places.indices(), mask.reshape(-1).nonzero().squeeze(1))
        assert torch.equal(run.values(short), arrays[f"trainable0_{short}"])


def test_trajectory_with_a_new_optimizer_at_the_release(arrays: dict[str, Tensor]) -> None:
    """The released code: the sixth gradient is dropped and the optimizer starts anew."""
    run, release = Run(arrays), int(arrays["progressive_iter"])
    frozen = {short: torch.zeros_like(run.values(short), dtype=torch.bool) for short in NAMES}
    kept: dict[str, Tensor] = {}
    for step in range(int(arrays["num_steps"])):
        close(run.backward(), arrays["loss_noabs"][step])
        for short in NAMES:
            close(run.values(short).detach(), arrays[f"weights_{short}_noabs"][step])
        if step == release:
            for short in NAMES:
                values = run.values(short).detach()
                frozen[short] = outside(values, float(arrays["threshold"]), "smallest")
                kept[short] = values[frozen[short]].clone()
                mask = arrays[f"mask2_{short}_noabs"][arrays[f"mask_{short}"]]
                assert torch.equal(~frozen[short], mask)
            run.optimizer = run.new_optimizer()
            continue
        for short in NAMES:
            if run.values(short).numel():
                expected = arrays[f"grads_{short}_noabs"][step]
                going_on = ~frozen[short]
                close(run.values(short).grad[going_on], expected[going_on])
        run.optimizer.step()
        with torch.no_grad():
            for short, values in kept.items():
                run.values(short)[frozen[short]] = values


def test_trajectory_with_progressive_release(arrays: dict[str, Tensor]) -> None:
    """The released code's other optimizer: its state goes on, and no step is left out."""
    run, steps = Run(arrays), int(arrays["num_steps"])
    regularization = Regularization(run.model, [ProgressiveRelease(0.5)])
    regularization.start(steps, 1)
    for step in range(steps):
        close(run.backward(), arrays["loss_adamw2"][step])
        for short in NAMES:
            close(run.values(short).detach(), arrays[f"weights_{short}_adamw2"][step])
            if run.values(short).numel():
                close(run.values(short).grad, arrays[f"grads_{short}_adamw2"][step])
        regularization.transform_gradients()
        run.optimizer.step()
        regularization.step_end()
    for short in NAMES:
        close(run.values(short).detach(), arrays[f"weights_{short}_adamw2"][steps])
