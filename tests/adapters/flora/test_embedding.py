"""FLoRA of an embedding's table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

IDS = torch.tensor([[0, 3, 5], [7, 0, 1]])


def test_output_is_that_of_the_changed_table(adapt) -> None:
    base = nn.Embedding(10, 6)
    model, layer = adapt(base, r=[3, 2], scale=1.5)
    table = base.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(model(IDS), table[IDS])
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), table[IDS])


def test_the_padding_row_stays_the_base_model_s(adapt) -> None:
    base = nn.Embedding(10, 6, padding_idx=0)
    base.weight.data[0] = 1.0
    model, layer = adapt(base, r=3)
    assert torch.equal(model(IDS)[0, 0], base.weight[0])
    model(IDS).square().sum().backward()
    factor = layer.flora_factor0["default"]
    assert not factor.grad[0].any()
    assert factor.grad[3].any()
    assert torch.equal(layer.get_delta_weight("default")[0], torch.zeros(6))


def test_embed_scale(adapt) -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    base = Scaled(10, 6)
    model, layer = adapt(base, r=3)
    expected = 3 * (base.weight + layer.get_delta_weight("default"))[IDS]
    torch.testing.assert_close(model(IDS), expected)


def test_ids_that_the_layer_shifts(adapt) -> None:
    class Positions(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 2)

    base = Positions(12, 6)
    model, layer = adapt(base, r=3)
    table = base.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(model(IDS), table[IDS + 2])


def test_dropout_drops_whole_tokens(adapt) -> None:
    base = nn.Embedding(10, 6)
    model, layer = adapt(base, r=3, dropout=0.5)
    ids = torch.full((1000,), 4)
    branch = model(ids) - base(ids)
    full = 2 * layer.get_delta_weight("default")[4]
    kept = branch.abs().sum(1) > 1e-6
    assert 400 < kept.sum() < 600
    torch.testing.assert_close(branch[kept], full.expand(int(kept.sum()), 6))


def test_max_norm_is_refused(adapt) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        adapt(nn.Embedding(10, 6, max_norm=1.0))
