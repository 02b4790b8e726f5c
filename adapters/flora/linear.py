"""FLoRA for `torch.nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.flora.functional import add_linear
from graftune.adapters.flora.weight import FloraWeight


class Linear(FloraWeight):
    """A linear map with y = W x + b + s · U_out G U_inᵀ x.

    `torch.nn.Linear` stores W as (out, in), transformers' Conv1D as (in, out); the axes of the
    core follow.
    """

    flora_factor0: nn.ParameterDict
    flora_factor1: nn.ParameterDict

    def _prepare(self) -> None:
        base = self.get_base_layer()
        self._is_in_out = isinstance(base, Conv1D)
        self.in_features, self.out_features = _get_in_out_features(base)  # type: ignore[var-annotated]

    def _add_branch(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        x = self._branch_input(x, adapter)
        if not self.uses_chain[adapter]:
            delta = self.get_delta_weight(adapter)
            return (result + F.linear(x, delta.t() if self._is_in_out else delta)).to(result.dtype)
        core, first, second = (
            self.flora_core[adapter],
            self.flora_factor0[adapter],
            self.flora_factor1[adapter],
        )
        if self._is_in_out:
            core, first, second = core.t(), second, first
        return add_linear(result, x, core, first, second, self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether PEFT's LoRA on the same module does the same: `peft.convert_to_lora` asks."""
        return self.has_branch and not self.weight_is_read
