"""FLoRA for convolutions and transposed convolutions of one to three spatial axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftune.adapters.flora.functional import (
    conv_branch,
    conv_dense,
    conv_transpose_branch,
    conv_transpose_dense,
)
from graftune.adapters.flora.weight import FloraWeight


class ConvNd(FloraWeight):
    """A convolution with y = W * x + b + s · U_out * (G ×_2 U_2 ...) * U_inᵀ * x.

    The three convolutions of the added branch are 1×1, of the kernel's size between r_in and
    r_out channels, and 1×1.
    """

    @property
    def groups(self) -> int:
        """The convolution's own, which PEFT's LoRA asks for that is put around this layer."""
        return self.get_base_layer().groups

    def _prepare(self) -> None:
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_channels, base.out_channels

    def _add_branch(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        base = self.get_base_layer()
        x = self._branch_input(x, adapter)
        is_batched = x.dim() == len(base.kernel_size) + 2
        geometry = {
            "stride": base.stride,
            "padding": base.padding,
            "dilation": base.dilation,
            "groups": base.groups,
            "padding_mode": base.padding_mode,
            "pad": base._reversed_padding_repeated_twice,
        }
        x = x if is_batched else x.unsqueeze(0)
        if self.uses_chain[adapter]:
            core, factors = self.tensors(adapter)
            branch = conv_branch(x, core, factors, self.scaling[adapter], **geometry)
        else:
            branch = conv_dense(x, self.get_delta_weight(adapter), **geometry)
        return _added(result, branch if is_batched else branch.squeeze(0))


class ConvTransposeNd(FloraWeight):
    """A transposed convolution, with the same chain of three as `ConvNd`."""

    def _prepare(self) -> None:
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_channels, base.out_channels

    def _add_branch(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        base = self.get_base_layer()
        x = self._branch_input(x, adapter)
        axes = len(base.kernel_size)
        is_batched = x.dim() == axes + 2
        geometry: dict[str, Any] = {
            "stride": base.stride,
            "padding": base.padding,
            "output_padding": self._output_padding(x.shape[-axes:], result.shape[-axes:]),
            "dilation": base.dilation,
            "groups": base.groups,
        }
        x = x if is_batched else x.unsqueeze(0)
        if self.uses_chain[adapter]:
            core, factors = self.tensors(adapter)
            branch = conv_transpose_branch(x, core, factors, self.scaling[adapter], **geometry)
        else:
            branch = conv_transpose_dense(x, self.get_delta_weight(adapter), **geometry)
        return _added(result, branch if is_batched else branch.squeeze(0))

    def _output_padding(self, given: torch.Size, wanted: torch.Size) -> tuple[int, ...]:
        """Return what `output_size` or the layer itself chose, told from the size of the result."""
        base = self.get_base_layer()
        return tuple(
            wanted[i]
            - (given[i] - 1) * base.stride[i]
            + 2 * base.padding[i]
            - base.dilation[i] * (base.kernel_size[i] - 1)
            - 1
            for i in range(len(base.kernel_size))
        )


def _added(result: Tensor, branch: Tensor) -> Tensor:
    return (result + branch).to(result.dtype)
