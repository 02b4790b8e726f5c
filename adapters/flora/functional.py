"""The mathematics of FLoRA: a weight update in Tucker form, applied without ever building it.

A weight of any number of axes N, stored with the dimensions d_0..d_{N-1}, is changed by

    ΔW = s · G ×_0 U_0 ×_1 U_1 ... ×_{N-1} U_{N-1}

with a core G of shape (r_0..r_{N-1}) and one factor U_n of shape (d_n, r_n) for each axis
(FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739, equation 4). Axes are the weight's
own, in the order in which it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def tucker_weight(core: Tensor, factors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Return ΔW = s · G ×_0 U_0 ... ×_{N-1} U_{N-1} as a dense tensor.

    Args:
        core: G, of shape (r_0..r_{N-1}).
        factors: U_0..U_{N-1}, of shapes (d_n, r_n).
        scale: s.

    Returns:
        A tensor of shape (d_0..d_{N-1}).

    Example:
        >>> tucker_weight(torch.ones(1, 1), [torch.ones(3, 1), torch.ones(2, 1)], 2.0).shape
        torch.Size([3, 2])
    """
    weight = _scaled(core, scale)
    for factor in factors:
        # The leading axis goes and comes back last: after N turns the order is the stored one.
        weight = _contract(weight, 0, factor)  # (r_n.., d_0..d_n)
    return weight


def resolve_ranks(r: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Return one Tucker rank for each axis of a weight of the given shape.

    A rank beyond its dimension adds numbers and no expressiveness: it is cut to the dimension.

    Args:
        r: one rank for all axes, or one for each axis in the weight's own order.
        shape: (d_0..d_{N-1}).

    Raises:
        ValueError: a rank is not positive, or there is not one for each axis.

    Example:
        >>> resolve_ranks(8, (64, 32, 3, 3))
        (8, 8, 3, 3)
    """
    ranks = (r,) * len(shape) if isinstance(r, int) else tuple(r)
    if len(ranks) != len(shape):
        raise ValueError(f"{list(ranks)} gives {len(ranks)} ranks for {len(shape)} axes")
    if any(rank <= 0 for rank in ranks):
        raise ValueError(f"ranks must be positive, got {r}")
    return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))


def init_tucker(
    shape: Sequence[int], ranks: Sequence[int], identity: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Return a fresh core and factors.

    Factors are drawn from N(0, 1/(2 r_n)), as in the authors' code. The core starts at zero, so
    that ΔW = 0 and the core alone has a gradient in the first step.

    Args:
        shape: (d_0..d_{N-1}).
        ranks: (r_0..r_{N-1}).
        identity: False draws the core from N(0, 0.01) instead: ΔW is not zero, for tests.
    """
    core = torch.zeros(*ranks) if identity else 0.1 * torch.randn(*ranks)
    factors = [
        torch.randn(size, rank) / math.sqrt(2 * rank)
        for size, rank in zip(shape, ranks, strict=True)
    ]
    return core, factors


def concatenate(
    parts: Sequence[tuple[Tensor, Sequence[Tensor]]], weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Return Σ_i w_i G_i ×_0 U_{i,0} ... as one Tucker form: ranks add up.

    The core is block-diagonal and the factors stand side by side. Where the ranks of an axis add
    up to more than its dimension, the factor is multiplied into the core and the identity takes
    its place, which is exact as well.

    Args:
        parts: core and factors of each form.
        weights: w_i.
    """
    cores = [core for core, _ in parts]
    axes = cores[0].dim()
    core = cores[0].new_zeros([sum(c.shape[axis] for c in cores) for axis in range(axes)])
    start = [0] * axes
    for block, weight in zip(cores, weights, strict=True):
        window = [slice(s, s + n) for s, n in zip(start, block.shape, strict=True)]
        core[tuple(window)] = weight * block
        start = [s + n for s, n in zip(start, block.shape, strict=True)]
    factors = [torch.cat([part[1][axis] for part in parts], dim=1) for axis in range(axes)]
    for axis, factor in enumerate(factors):
        size, rank = factor.shape
        if rank > size:
            moved = torch.tensordot(core, factor, dims=([axis], [1]))  # axis goes last
            core = moved.movedim(-1, axis).contiguous()
            factors[axis] = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return core, factors


def chain_is_cheaper(
    shape: Sequence[int],
    ranks: Sequence[int],
    groups: int = 1,
    stride: int = 1,
    one_op: bool = True,
) -> bool:
    """Say whether the factored chain takes fewer multiply-adds in a training step than dense ΔW.

    Per position, the chain costs c = d_0 r_0 + g r_0 r_1 k + s g d_1 r_1, and the layer itself
    d = Π d_n. A training step runs forward, input gradient and parameter gradient of whatever is
    added: 3 c for the chain, 3 d for a dense ΔW applied on its own. Where a dense ΔW can be added
    to the weight first, the layer runs once and all that is added is its weight gradient, d.

    Args:
        shape: the weight's (d_0..d_{N-1}); axes from the third on are the kernel's.
        ranks: (r_0..r_{N-1}).
        groups: g, of a convolution.
        stride: s, product of a convolution's strides.
        one_op: a dense ΔW would be added to the weight first.
    """
    kernel = math.prod(shape[2:])
    chain = (
        shape[0] * ranks[0]
        + groups * ranks[0] * ranks[1] * kernel
        + stride * groups * shape[1] * ranks[1]
    )
    dense = math.prod(shape)
    return 3 * chain < dense if one_op else chain < dense


def add_linear(
    result: Tensor, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor, scale: float
) -> Tensor:
    """Return result + s · x U_in Gᵀ U_outᵀ.

    Args:
        result: (..., d_out), the layer's own output.
        x: (..., d_in).
        core: G, (r_out, r_in).
        u_out: (d_out, r_out).
        u_in: (d_in, r_in).
        scale: s.
    """
    # The core is folded into one side once a call: two products over the positions remain. The
    # side is chosen so that the narrower rank is between them.
    r_out, r_in = core.shape
    if r_out < r_in or (r_out == r_in and u_in.shape[0] <= u_out.shape[0]):
        down, up = u_in @ core.t(), u_out  # (d_in, r_out), (d_out, r_out)
    else:
        down, up = u_in, u_out @ core  # (d_in, r_in), (d_out, r_in)
    hidden = x.reshape(-1, x.shape[-1]) @ down
    return _add_product(result, hidden, up.t(), scale)


def add_embedding(
    result: Tensor, rows: Tensor, core: Tensor, u_dim: Tensor, scale: float
) -> Tensor:
    """Return result + s · rows G U_dimᵀ.

    Args:
        result: (..., dim), the looked-up embeddings.
        rows: (..., r_num), the rows of the first factor that belong to the ids.
        core: G, (r_num, r_dim).
        u_dim: (dim, r_dim).
        scale: s.
    """
    return _add_product(result, rows.reshape(-1, rows.shape[-1]), core @ u_dim.t(), scale)


def conv_branch(
    x: Tensor,
    core: Tensor,
    factors: Sequence[Tensor],
    scale: float,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    pad: Sequence[int] = (),
) -> Tensor:
    """Return the convolution of x with ΔW: 1×1 by U_in, kernel of rank size, 1×1 by U_out.

    Args:
        x: (batch, d_in · groups, *spatial).
        core: G, (r_out, r_in, *r_kernel).
        factors: U_out (d_out, r_out), U_in (d_in, r_in), then one for each kernel axis.
        scale: s.
        stride, padding, dilation, groups: the convolution's own.
        padding_mode: "zeros", or a mode of `torch.nn.functional.pad`.
        pad: what to give to `torch.nn.functional.pad` in a mode other than "zeros".
    """
    u_out, u_in, *u_kernel = factors
    conv = _CONV[len(u_kernel)]
    batch = x.shape[0]
    # U_in is the same for all groups, so groups can stand in the batch until U_out, whose rows
    # belong to one group each.
    z = x if groups == 1 else x.reshape(batch * groups, -1, *x.shape[2:])
    z = conv(z, _pointwise(u_in.t(), len(u_kernel)))  # (batch · g, r_in, *spatial)
    if padding_mode != "zeros":
        # A pointwise map commutes with every padding: pad the few channels, not the many.
        z = F.pad(z, list(pad), mode=padding_mode)
        padding = (0,) * len(u_kernel)
    z = conv(z, _kernel(core, u_kernel, scale), None, stride, padding, dilation)
    if groups != 1:
        z = z.reshape(batch, -1, *z.shape[2:])  # (batch, g · r_out, *spatial)
    return conv(z, _pointwise(u_out, len(u_kernel)), groups=groups)


def conv_transpose_branch(
    x: Tensor,
    core: Tensor,
    factors: Sequence[Tensor],
    scale: float,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return the transposed convolution of x with ΔW, as the same chain of three.

    Args:
        x: (batch, d_in, *spatial).
        core: G, (r_in, r_out, *r_kernel).
        factors: U_in (d_in, r_in), U_out (d_out, r_out), then one for each kernel axis; the
            layer has d_out · groups output channels.
        scale: s.
        stride, padding, output_padding, dilation, groups: the layer's own.
    """
    u_in, u_out, *u_kernel = factors
    conv, conv_transpose = _CONV[len(u_kernel)], _CONV_TRANSPOSE[len(u_kernel)]
    batch, r_in = x.shape[0], u_in.shape[1]
    # Rows of U_in belong to one group each: (d_in, r_in) -> (g · r_in, d_in / g).
    down = u_in.t() if groups == 1 else u_in.reshape(groups, -1, r_in).transpose(1, 2).flatten(0, 1)
    z = conv(x, _pointwise(down, len(u_kernel)), groups=groups)  # (batch, g · r_in, *spatial)
    if groups != 1:
        z = z.reshape(batch * groups, r_in, *z.shape[2:])
    kernel = _kernel(core, u_kernel, scale)  # (r_in, r_out, *kernel)
    z = conv_transpose(z, kernel, None, stride, padding, output_padding, 1, dilation)
    z = conv(z, _pointwise(u_out, len(u_kernel)))  # (batch · g, d_out, *spatial)
    return z if groups == 1 else z.reshape(batch, -1, *z.shape[2:])


def conv_dense(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    pad: Sequence[int] = (),
) -> Tensor:
    """Return the convolution of x with a dense ΔW of shape (d_out, d_in, *kernel)."""
    if padding_mode != "zeros":
        x = F.pad(x, list(pad), mode=padding_mode)
        padding = (0,) * (weight.dim() - 2)
    return _CONV[weight.dim() - 2](x, weight, None, stride, padding, dilation, groups)


def conv_transpose_dense(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return the transposed convolution of x with a dense ΔW of shape (d_in, d_out, *kernel)."""
    conv_transpose = _CONV_TRANSPOSE[weight.dim() - 2]
    return conv_transpose(x, weight, None, stride, padding, output_padding, groups, dilation)


def _kernel(core: Tensor, factors: Sequence[Tensor], scale: float) -> Tensor:
    """Contract the core's kernel axes: (r_0, r_1, *r_kernel) -> (r_0, r_1, *kernel)."""
    kernel = _scaled(core, scale)
    for factor in factors:
        kernel = _contract(kernel, 2, factor)
    return kernel


def _contract(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    """Multiply one axis by a factor (d, r) and put it last: (.., r, ..) to (.., .., d)."""
    # Of more than two axes, the kernel of `@`, and so its last bits, would depend on whether the
    # tensor is trainable, and a loaded adapter would compute something else than the saved one.
    rows = tensor.movedim(axis, -1)
    product = rows.reshape(-1, rows.shape[-1]) @ factor.t()
    return product.reshape(*rows.shape[:-1], factor.shape[0])


def _pointwise(matrix: Tensor, axes: int) -> Tensor:
    """View a matrix as the weight of a convolution with a kernel of one position."""
    return matrix.reshape(*matrix.shape, *(1,) * axes)


def _scaled(core: Tensor, scale: float) -> Tensor:
    return core if scale == 1 else core * scale


def _add_product(result: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return result + s · left right in the dtype of `result`, in one operation where possible."""
    if result.dtype == left.dtype == right.dtype:
        flat = result.reshape(-1, result.shape[-1])
        return torch.addmm(flat, left, right, alpha=scale).view(result.shape)
    product = (left @ right).view(result.shape)
    return torch.add(result, product, alpha=scale).to(result.dtype)
