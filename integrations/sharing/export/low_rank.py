"""Matrices of low rank: exact ones from Tucker forms, the best ones from singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank M = up · down, or a stack of them.

    Args:
        up: (..., m, r).
        down: (..., r, n).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[-2]

    @property
    def mT(self) -> LowRank:
        """The transposed matrix, of the same rank."""
        return LowRank(self.down.mT, self.up.mT)

    def dense(self) -> Tensor:
        """Return M, (..., m, n)."""
        return self.up @ self.down

    def squared_norm(self) -> float:
        """Return ‖M‖², the squares of all its entries summed up, without building M."""
        # trace(Mᵀ M) = Σ (upᵀ up) ⊙ (down downᵀ)
        return float(((self.up.mT @ self.up) * (self.down @ self.down.mT)).sum())

    def padded(self, rank: int) -> LowRank:
        """Return the same matrix with zeros up to the given rank."""
        missing = rank - self.rank
        up = torch.nn.functional.pad(self.up, (0, missing))
        return LowRank(up, torch.nn.functional.pad(self.down, (0, 0, 0, missing)))


def fold(core: Tensor, factors: Sequence[Tensor]) -> LowRank:
    """Return G ×_0 U_0 ... ×_{N-1} U_{N-1} as a matrix of the first axis by all others, exactly.

    With G also for the core's matrix (r_0, r_1 ⋯ r_{N-1}) and K = U_1 ⊗ ... ⊗ U_{N-1}, the matrix
    is U_0 G Kᵀ. The core goes to the side that leaves the smaller rank, min(r_0, r_1 ⋯ r_{N-1}).

    Args:
        core: G, (r_0, r_1, ...).
        factors: U_n, (d_n, r_n).

    Returns:
        up (d_0, r) and down (r, d_1 d_2 ⋯).

    Example:
        >>> fold(torch.ones(2, 1), [torch.ones(5, 2), torch.ones(3, 1)]).rank
        1
    """
    first, *others = factors
    matrix = core.flatten(1)  # (r_0, r_1 ⋯)
    if matrix.shape[0] < matrix.shape[1]:
        down = core
        for factor in others:
            down = down.movedim(1, -1) @ factor.mT  # the axis goes last: after all, in order again
        return LowRank(first, down.flatten(1))
    return LowRank(first @ matrix, reduce(torch.kron, others).mT)


def fold_stack(core: Tensor, factors: Sequence[Tensor]) -> LowRank:
    """Return a Tucker form of three axes as one matrix of low rank for each index of the first.

    Args:
        core: G, (r_0, r_1, r_2).
        factors: U_n, (d_n, r_n).

    Returns:
        up (d_0, d_1, r) and down (d_0, r, d_2) with r = min(r_1, r_2).
    """
    first, second, third = factors
    cores = torch.einsum("ei,iab->eab", first, core)  # (d_0, r_1, r_2)
    count = len(cores)
    if core.shape[1] < core.shape[2]:
        return LowRank(second.expand(count, -1, -1), cores @ third.mT)
    return LowRank(second @ cores, third.mT.expand(count, -1, -1))


def best(matrix: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return the nearest matrix of at most the given rank in the Frobenius norm, and ‖error‖².

    It is the sum of the `rank` largest terms of the singular value decomposition (Eckart and
    Young, 1936); the squared error is the sum of the other singular values' squares.

    Args:
        matrix: (..., m, n); of a stack each matrix is approximated by itself.
        rank: at least 1; cut to min(m, n).
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()  # half of σ on either side: numbers of one size round best
    kept = LowRank(u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :])
    return kept, float(s[..., rank:].square().sum())


def reduced(form: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the nearest matrix of at most the given rank, and ‖error‖²; no dense matrix is built.

    Args:
        form: of whatever rank; returned as it is where that is not larger.
        rank: at least 1.
    """
    if form.rank <= rank:
        return form, 0.0
    left, upper = torch.linalg.qr(form.up)
    right, lower = torch.linalg.qr(form.down.mT)
    inner, squared_error = best(upper @ lower.mT, rank)
    return LowRank(left @ inner.up, inner.down @ right.mT), squared_error
