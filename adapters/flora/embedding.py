"""FLoRA for `torch.nn.Embedding`: a rank-2 Tucker form of its table."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from graftune.adapters.flora.functional import add_embedding
from graftune.adapters.flora.weight import FloraWeight


class Embedding(FloraWeight):
    """A table lookup with y = W[i] + s · U_num[i] G U_dimᵀ.

    The row of `padding_idx` stays the base model's, as it does in training the table itself.
    """

    flora_factor0: nn.ParameterDict
    flora_factor1: nn.ParameterDict

    def _prepare(self) -> None:
        base = self.get_base_layer()
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def _is_chain_cheaper(self, shape: Sequence[int], ranks: Sequence[int], one_op: bool) -> bool:
        return True  # a few rows are looked up; ΔW is as large as the table

    def _prepare_factors(self, factors: list[Tensor]) -> None:
        padding = self.get_base_layer().padding_idx
        if padding is not None:
            factors[0][padding] = 0  # and its gradient is zero: it stays so

    def _add_branch(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        base = self.get_base_layer()
        rows = F.embedding(
            x,
            self.flora_factor0[adapter],
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        if self.training and adapter in self.flora_dropout:
            # The input is one-hot: to drop its entry is to drop the whole row.
            rows = rows * self.flora_dropout[adapter](rows.new_ones((*x.shape, 1)))
        core = self.flora_core[adapter]
        embed_scale = self._get_embed_scale()
        if embed_scale is not None:
            core = core * embed_scale.to(core.dtype)
        return add_embedding(result, rows, core, self.flora_factor1[adapter], self.scaling[adapter])
