"""Layers whose weight has a few trained entries: forward as the plain layer, gradient for these.

Each function runs a layer with W′ = W, except v at the trained places. The dense weight gradient
exists for one block of rows at a time, in the layer's backward pass; what autograd keeps is the
input and v (unstructural backpropagation, arXiv 2409.06633, section 4.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from graftune.adapters.sara.places import Block, Places
from graftune.adapters.sara.weight import WHOLE, WeightInUse
from graftune.adapters.sara.workspace import workspace

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
    """y = x W′ᵀ + b: (x, values, bias, weight, transposed) to (..., out).

    `transposed` says that W′ is (in, out), y = x W′ + b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        weight: WeightInUse,
        transposed: bool,
    ) -> Tensor:
        """Return the output, in the dtype of x."""
        _save(ctx, x, values, bias, weight)
        ctx.transposed = transposed
        wanted = WHOLE if transposed else weight.parts
        parts = (
            F.linear(x, _mT_if(transposed, weight.rows(values, part, x.dtype)), _rows(bias, part))
            for part in wanted
        )
        return _joined(parts, wanted, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, of the values and of the bias."""
        x, values, weight = _saved(ctx)
        grad = grads[0].to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])  # (B, out)
        grad_x: Any = None
        entries = None
        if ctx.needs_input_grad[0]:
            for part in WHOLE if ctx.transposed else weight.parts:
                weights = _mT_if(ctx.transposed, weight.rows(values, part, ctx.dtype))
                share = _rows(rows, part, 1)
                grad_x = share @ weights if grad_x is None else grad_x.addmm_(share, weights)
            grad_x = grad_x.reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])  # (B, in)
            left, right = (inputs, rows) if ctx.transposed else (rows, inputs)
            dense = (_product(left[:, block.rows], right) for block in weight.places.blocks)
            entries = _entries(dense, weight.places, values.dtype)
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, entries, grad_bias, None, None


class SparseConvolution(Function):
    """y = W′ ∗ x + b: (x, values, bias, weight, geometry) to (B, out, ...).

    `geometry` is stride, padding, dilation, transposed, output_padding, groups. The weight's
    gradient of a grouped or transposed convolution is made in one piece.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        weight: WeightInUse,
        geometry: Sequence[Any],
    ) -> Tensor:
        """Return the output, in the dtype of x."""
        _save(ctx, x, values, bias, weight)
        ctx.geometry, ctx.shape = geometry, x.shape
        wanted = weight.parts if _by_rows(geometry) else WHOLE
        parts = (
            _conv(x, weight.rows(values, part, x.dtype), _rows(bias, part), *geometry)
            for part in wanted
        )
        return _joined(parts, wanted, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, of the values and of the bias."""
        x, values, weight = _saved(ctx)
        places, geometry, grad = weight.places, ctx.geometry, grads[0].to(ctx.dtype)
        grad_x = entries = grad_bias = None
        if ctx.needs_input_grad[0]:
            like = grad.new_empty(()).expand(ctx.shape) if x is None else x  # for its shape alone
            for part in weight.parts if _by_rows(geometry) else WHOLE:
                weights, share = weight.rows(values, part, ctx.dtype), _rows(grad, part, 1)
                found = _conv_backward(share, like, weights, None, *geometry, [True, False, False])
                grad_x = found[0] if grad_x is None else grad_x.add_(found[0])
        if ctx.needs_input_grad[1]:
            blocks = places.blocks if _by_rows(geometry) else WHOLE
            only = [False, True, False]
            dense = (
                _conv_backward(
                    _rows(grad, block, 1),
                    x,
                    _rows(weight.weight, block).to(ctx.dtype),  # for its shape alone
                    None,
                    *geometry,
                    only,
                )[1]
                for block in blocks
            )
            entries = _entries(dense, places, values.dtype, blocks)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum([axis for axis in range(grad.dim()) if axis != 1])
        return grad_x, entries, grad_bias, None, None


class SparseEmbedding(Function):
    """Rows of W′: (ids, values, weight, dtype, padding_idx) to (..., dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        values: Tensor,
        weight: WeightInUse,
        dtype: torch.dtype,
        padding_idx: int | None,
    ) -> Tensor:
        """Return the rows, in a dtype."""
        ctx.save_for_backward(ids)
        ctx.places, ctx.dtype, ctx.padding_idx = weight.places, values.dtype, padding_idx
        if len(weight.parts) == 1:
            return F.embedding(ids, weight.rows(values, weight.parts[0], dtype))
        flat, rows = ids.reshape(-1), None
        for part in weight.parts:
            assert part is not None
            here, local = _ids_in(part.rows, flat)
            found = weight.rows(values, part, dtype)[local]
            rows = found if rows is None else torch.where(here.unsqueeze(1), found, rows)
        assert rows is not None
        return rows.reshape(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient of the values."""
        (ids,), places = ctx.saved_tensors, ctx.places
        flat, rows = ids.reshape(-1), grads[0].reshape(ids.numel(), -1)
        if ctx.padding_idx is not None:
            rows = rows * (flat != ctx.padding_idx).unsqueeze(1)

        def dense(block: Block) -> Tensor:
            here, local = _ids_in(block.rows, flat)
            return rows.new_zeros(block.shape).index_add(0, local, rows * here.unsqueeze(1))

        entries = _entries(map(dense, places.blocks), places, ctx.dtype)
        return None, entries, None, None, None


def _save(
    ctx: Any, x: Tensor, values: Tensor | None, bias: Tensor | None, weight: WeightInUse
) -> None:
    # W is not among them: it is asked for again, and may hold other values in between.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
    ctx.weight, ctx.dtype, ctx.has_bias = weight, x.dtype, bias is not None


def _saved(ctx: Any) -> tuple[Any, Any, Any]:
    x, values = ctx.saved_tensors
    # With gradients on, the backward pass is to be differentiated itself.
    weight = ctx.weight.differentiable() if torch.is_grad_enabled() else ctx.weight
    return x, values, weight


def _rows(tensor: Any, part: Block | None, axis: int = 0) -> Any:
    """Return what of a bias or of a gradient belongs to some rows of the weight."""
    if tensor is None or part is None:
        return tensor
    return tensor.narrow(axis, part.rows.start, part.rows.stop - part.rows.start)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right, the dense gradient of some rows of a weight."""
    if torch.is_grad_enabled():  # to be differentiated itself
        return left.mT @ right
    shape = (left.shape[1], right.shape[1])
    memory = workspace("block", shape, dtype=left.dtype, device=left.device)
    return torch.mm(left.mT, right, out=memory)


def _mT_if(transposed: bool, weight: Tensor) -> Tensor:
    return weight.mT if transposed else weight


def _by_rows(geometry: Sequence[Any]) -> bool:
    *_, transposed, _, groups = geometry
    return not transposed and groups == 1


def _joined(results: Iterable[Tensor], parts: Sequence[Block | None], axis: int) -> Tensor:
    """Put the outputs of parts of the rows into one, one after the other."""
    total = None
    for result, part in zip(results, parts, strict=True):
        if len(parts) == 1:
            return result
        last = parts[-1]
        assert part is not None
        assert last is not None
        if total is None:
            shape = list(result.shape)
            shape[axis] = last.rows.stop
            total = result.new_empty(shape)
        _rows(total, part, axis).copy_(result)
    assert total is not None
    return total


def _entries(
    dense: Iterable[Tensor],
    places: Places,
    dtype: torch.dtype,
    blocks: Sequence[Block | None] | None = None,
) -> Tensor:
    """Return the entries of a weight's gradient, which comes by the blocks of rows (or others)."""
    blocks = places.blocks if blocks is None else blocks
    found = [
        places.take(part, block, places.indices(block, for_now=True)).to(dtype)
        for part, block in zip(dense, blocks, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _ids_in(rows: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Say which ids lie among the rows, and give each one's place there (0 where it has none)."""
    here = (ids >= rows.start) & (ids < rows.stop)
    return here, torch.where(here, ids - rows.start, 0)
