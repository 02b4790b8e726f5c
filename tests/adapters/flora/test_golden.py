"""The numbers of the authors' released code, through the public API."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parents[2] / "golden"


def own_order(axes: int) -> list[int]:
    """The released core has its axes as (in, out, kernel...); ours are the weight's own."""
    return [1, 0, *range(2, axes)]


@pytest.mark.parametrize("case", ["flora_linear", "flora_conv2d"])
@pytest.mark.parametrize("chain", [True, False])
def test_golden(case: str, chain: bool, adapt) -> None:
    expected = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{case}.npz").items()}
    assert set(json.loads((GOLDEN / f"{case}.json").read_text())["arrays"]) == set(expected)
    weight = expected["base_weight"]
    if "stride" in expected:
        base = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            tuple(weight.shape[2:]),
            *(tuple(expected[name].tolist()) for name in ("stride", "padding", "dilation")),
            dtype=torch.float64,
        )
    else:
        base = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    base.load_state_dict({"weight": weight, "bias": expected["base_bias"]})
    core = expected["G"].permute(own_order(weight.dim()))
    model, layer = adapt(base, r=list(core.shape), scale=float(expected["scale"]))
    layer.uses_chain["default"] = chain
    with torch.no_grad():
        layer.flora_core["default"].copy_(core)
        for axis, theirs in enumerate(own_order(weight.dim())):
            getattr(layer, f"flora_factor{axis}")["default"].copy_(expected[f"U{theirs}"])

    def close(actual: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(actual, expected[name], rtol=1e-9, atol=1e-12)

    output = model(expected["input"])
    loss = output.square().sum()
    loss.backward()
    close(output, "output")
    close(loss, "loss")
    close(layer.get_delta_weight("default"), "delta_weight")
    close(layer.flora_core["default"].grad.permute(own_order(weight.dim())), "grad_G")
    for axis, theirs in enumerate(own_order(weight.dim())):
        close(getattr(layer, f"flora_factor{axis}")["default"].grad, f"grad_U{theirs}")
    with model.disable_adapter():
        close(model(expected["input"]), "base_output")
    model.merge_adapter()
    close(model(expected["input"]), "output")
