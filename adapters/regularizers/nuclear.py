"""The nuclear norm of a matrix and its gradient: by singular values, or by matrix products alone.

The gradient of ‖M‖_* = Σσ_i is U Vᵀ, the polar factor of M. It is the limit of the Newton–Schulz
iteration X ← X (3 I - Xᵀ X) / 2, which needs no decomposition; scaled for the interval in which
the singular values are known to lie, it takes about a dozen steps (Chen and Chow, A stable scaling
of Newton-Schulz for improving the sign function computation of a Hermitian matrix, 2014).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from graftune.adapters.base.precision import at_least_float32

Method = Literal["auto", "svd", "polar"]

SVD_UP_TO = 256  # the smaller side up to which "auto" decomposes
# A larger scaling takes one to next to nothing, and the digits of the largest values with it.
_STABLE = 1.69
# Singular values down to this share of the largest are taken to one by the iteration.
_RESOLVED = {torch.float32: 1e-4, torch.float64: 1e-8}


def nuclear_norm_and_gradient(
    matrix: Tensor, mask: Tensor | None = None, method: Method = "auto"
) -> tuple[Tensor, Tensor]:
    """Return ‖W ⊙ mask‖_* and its gradient with respect to W, which is (U Vᵀ) ⊙ mask.

    SaRA, arXiv 2409.06633, section 4.3. U Vᵀ is made of the singular vectors whose values are not
    zero: of a matrix without full rank it is the subgradient of smallest norm.

    Args:
        matrix: W, (m, n), computed in float32 or better.
        mask: booleans or 0 and 1, (m, n); None is all of W.
        method: "svd" is exact; "polar" has matrix products only. With P for its U Vᵀ,
            0 ≤ ‖M‖_* - norm ≤ √min(m, n) · ‖(I - P Pᵀ) M‖_F: singular values down to 1e-4 of the
            largest (1e-8 in float64) are right to rounding, smaller ones are counted with less
            than their size. "auto" decomposes up to a smaller side of 256.

    Returns:
        The norm, of no axes, and the gradient, (m, n), in the dtype of the computation.

    Raises:
        ValueError: not a matrix, a mask of another shape, or an unknown method.

    Example:
        >>> norm, gradient = nuclear_norm_and_gradient(torch.diag(torch.tensor([3.0, -4.0])))
        >>> norm, gradient.diagonal()
        (tensor(7.), tensor([ 1., -1.]))
    """
    if matrix.dim() != 2:
        raise ValueError(f"a nuclear norm is that of a matrix, got the shape {tuple(matrix.shape)}")
    if mask is not None and mask.shape != matrix.shape:
        raise ValueError(f"the mask has the shape {tuple(mask.shape)}, not {tuple(matrix.shape)}")
    if method not in ("auto", "svd", "polar"):
        raise ValueError(f"`method` is 'auto', 'svd' or 'polar', got {method!r}")
    matrix = at_least_float32(matrix.detach())
    if mask is not None:
        matrix = matrix * mask
    if method == "auto":
        method = "svd" if min(matrix.shape) <= SVD_UP_TO else "polar"
    factor = _factor_by_svd(matrix) if method == "svd" else polar_factor(matrix)
    norm = (factor * matrix).sum()  # tr(Pᵀ M)
    return norm, factor if mask is None else factor * mask


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U Vᵀ of a matrix (m, n) by the scaled Newton–Schulz iteration.

    Example:
        >>> factor = polar_factor(torch.diag(torch.tensor([3.0, -4.0])))
        >>> factor.diagonal().round(decimals=4)
        tensor([ 1., -1.])
    """
    if matrix.shape[0] > matrix.shape[1]:
        return polar_factor(matrix.mT).mT
    # (Σσ⁴)^¼, which is never below the largest singular value.
    scale = (matrix @ matrix.mT).square().sum().sqrt().sqrt()
    x = matrix / scale.clamp(min=torch.finfo(matrix.dtype).tiny)  # (m, n)
    low, tolerance = _RESOLVED[matrix.dtype], torch.finfo(matrix.dtype).eps
    # The scale is above the largest value by at most the fourth root of their number.
    low /= max(matrix.shape[0], 1) ** 0.25
    while 1 - low > tolerance:
        # Maps [low, 1] into [low', 1] with the largest low' that such a cubic reaches.
        a = min(math.sqrt(3 / (1 + low + low**2)), _STABLE)
        x = 1.5 * a * x - (0.5 * a**3) * (x @ x.mT) @ x  # (m, n)
        low = 0.5 * a * low * (3 - (a * low) ** 2)
    return x


def _factor_by_svd(matrix: Tensor) -> Tensor:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    smallest = max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[:1]
    return (u * (values > smallest)) @ vt
