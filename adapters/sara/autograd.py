"""Layers whose weight has a few trained entries: forward as the plain layer, gradient for these.

Each function runs a layer with W′ = W, except v at the trained places. W′ and the dense weight
gradient exist for one block of rows at a time, in the forward pass and again in the layer's
backward pass; what autograd keeps is the input, W and v (unstructural backpropagation, arXiv
2409.06633, section 4.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .places import Places
from .workspace import workspace

_conv = torch.ops.aten.convolution
_conv_backward = torch.ops.aten.convolution_backward


class SparseTensor(Function):
    """W′ as a dense tensor: (values, weight, places) to the weight's shape."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, places: Places) -> Tensor:
        """Return W′ in the dtype of W."""
        ctx.places, ctx.dtype = places, values.dtype
        return places.put(weight, values, weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the entries of the dense gradient."""
        return ctx.places.take(grads[0]).to(ctx.dtype), None, None


class SparseLinear(Function):
    """y = x W′ᵀ + b: (x, values, weight, bias, places) to (..., out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, places: Places
    ) -> Tensor:
        """Return the output, in the dtype of x."""
        ctx.save_for_backward(x, values, weight)
        ctx.places, ctx.has_bias = places, bias is not None
        if len(places.blocks) == 1:
            return F.linear(x, places.put(weight, values, x.dtype, for_now=True), bias)
        parts = (
            F.linear(
                x,
                places.put(weight, values, x.dtype, block, for_now=True),
                None if bias is None else bias[block.rows],
            )
            for block in places.blocks
        )
        return _joined(parts, places, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, of the values and of the bias."""
        x, values, weight = ctx.saved_tensors
        places, grad = ctx.places, grads[0].to(x.dtype)
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x, entries = None, []
        for block in places.blocks:
            part = rows[:, block.rows]  # (B, rows)
            at = places.indices(block)
            if ctx.needs_input_grad[0]:
                weights = places.put(weight, values, x.dtype, block, at, for_now=True)
                grad_x = part @ weights if grad_x is None else grad_x.addmm_(part, weights)
            if ctx.needs_input_grad[1]:
                dense = _weight_gradient(part, inputs)
                entries.append(places.take(dense, block, at).to(values.dtype))
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
        grad_x = None if grad_x is None else grad_x.reshape(x.shape)
        return grad_x, _one_after_the_other(entries), None, grad_bias, None


class SparseConvolution(Function):
    """y = W′ ∗ x + b: (x, values, weight, bias, places, geometry) to (B, out, ...).

    `geometry` is stride, padding, dilation, transposed, output_padding, groups. Grouped and
    transposed convolutions run with the whole of W′.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: Places,
        geometry: Sequence[Any],
    ) -> Tensor:
        """Return the output, in the dtype of x."""
        ctx.save_for_backward(x, values, weight)
        ctx.places, ctx.geometry, ctx.has_bias = places, geometry, bias is not None
        if not _by_rows(places, geometry):
            return _conv(x, places.put(weight, values, x.dtype, for_now=True), bias, *geometry)
        parts = (
            _conv(
                x,
                places.put(weight, values, x.dtype, block, for_now=True),
                None if bias is None else bias[block.rows],
                *geometry,
            )
            for block in places.blocks
        )
        return _joined(parts, places, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, of the values and of the bias."""
        x, values, weight = ctx.saved_tensors
        places, grad = ctx.places, grads[0].to(x.dtype)
        wanted = [*ctx.needs_input_grad[:2], False]
        blocks = places.blocks if _by_rows(places, ctx.geometry) else (None,)
        grad_x, entries = None, []
        for block in blocks:
            at = places.indices(block)
            weights = places.put(weight, values, x.dtype, block, at, for_now=True)
            part = grad if block is None else grad[:, block.rows]
            share, dense, _ = _conv_backward(part, x, weights, None, *ctx.geometry, wanted)
            if wanted[0]:
                grad_x = share if grad_x is None else grad_x.add_(share)
            if wanted[1]:
                entries.append(places.take(dense, block, at).to(values.dtype))
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = grad.sum([axis for axis in range(grad.dim()) if axis != 1])
        return grad_x, _one_after_the_other(entries), None, grad_bias, None, None


class SparseEmbedding(Function):
    """Rows of W′: (ids, values, weight, places, padding_idx) to (..., dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        values: Tensor,
        weight: Tensor,
        places: Places,
        padding_idx: int | None,
    ) -> Tensor:
        """Return the rows, in the dtype of W."""
        ctx.save_for_backward(ids)
        ctx.places, ctx.dtype, ctx.padding_idx = places, values.dtype, padding_idx
        if len(places.blocks) == 1:
            return F.embedding(ids, places.put(weight, values, weight.dtype, for_now=True))
        flat = ids.reshape(-1)
        rows = weight.new_empty(flat.numel(), weight.shape[1])
        for block in places.blocks:
            here, local = _ids_in(block.rows, flat)
            part = places.put(weight, values, weight.dtype, block, for_now=True)
            rows = torch.where(here.unsqueeze(1), part[local], rows)
        return rows.reshape(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient of the values."""
        (ids,), places = ctx.saved_tensors, ctx.places
        flat, rows = ids.reshape(-1), grads[0].reshape(ids.numel(), -1)
        if ctx.padding_idx is not None:
            rows = rows * (flat != ctx.padding_idx).unsqueeze(1)
        entries = []
        for block in places.blocks:
            here, local = _ids_in(block.rows, flat)
            dense = rows.new_zeros(block.shape).index_add(0, local, rows * here.unsqueeze(1))
            entries.append(places.take(dense, block).to(ctx.dtype))
        return None, _one_after_the_other(entries), None, None, None


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """Return the dense gradient of some rows of a weight, in the memory that their W′ had."""
    if torch.is_grad_enabled():  # to be differentiated itself
        return grad.mT @ inputs
    shape = (grad.shape[1], inputs.shape[1])
    return torch.mm(grad.mT, inputs, out=workspace(shape, dtype=grad.dtype, device=grad.device))


def _by_rows(places: Places, geometry: Sequence[Any]) -> bool:
    *_, transposed, _, groups = geometry
    return len(places.blocks) > 1 and not transposed and groups == 1


def _joined(parts: Iterable[Tensor], places: Places, axis: int) -> Tensor:
    """Put the outputs of the blocks of rows into one, one after the other."""
    result = None
    for part, block in zip(parts, places.blocks, strict=True):
        if result is None:
            shape = list(part.shape)
            shape[axis] = places.shape[0]
            result = part.new_empty(shape)
        result.narrow(axis, block.rows.start, part.shape[axis]).copy_(part)
    assert result is not None
    return result


def _one_after_the_other(entries: list[Tensor]) -> Tensor | None:
    """Put the entries of the blocks together; those of a single one are not copied."""
    if not entries:
        return None
    return entries[0] if len(entries) == 1 else torch.cat(entries)


def _ids_in(rows: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Say which ids lie among the rows, and give each one's place there (0 where it has none)."""
    here = (ids >= rows.start) & (ids < rows.stop)
    return here, torch.where(here, ids - rows.start, 0)
