"""The places of a tensor's trained entries, in about one byte an entry.

What is kept is the distance from one entry to the next, in the tensor's row-major order: at the
densities that SaRA trains, 5 to 20 %, nearly all of them fit a byte. Rows are grouped into blocks
that are decoded apart, so that a large layer never needs more than a block at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from graftune.adapters.sara.workspace import workspace

BLOCK = 2**21  # weights in a block of rows: 8 MiB in float32
LANES = 32  # rows that matrix products and convolutions take at a time, or a divisor of it
WHOLE = 2  # blocks that a tensor may be as large as and still be one: splitting costs time, too

VECTOR = 2**16  # numbers of a vector whose places are not worth packing


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor: the rows, its entries and its long distances among all of them."""

    rows: slice
    entries: slice
    jumps: slice
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Places:
    """Which entries of a tensor are trained.

    Args:
        shape: the tensor's shape.
        gaps: (n,), distances to the entry before, the first of a block its index; uint8
            modulo 256, or int32 where entries are few. Of a short vector the indices, in int64:
            biases and norms are many, and small.
        jump_at, jumps: where a distance is longer than a gap can say, and by how much.
        blocks: the blocks of rows.
    """

    shape: tuple[int, ...]
    gaps: Tensor
    jump_at: Tensor
    jumps: Tensor
    blocks: tuple[Block, ...]

    @property
    def count(self) -> int:
        """The number of entries, n."""
        return self.gaps.numel()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.numel() * t.element_size() for t in (self.gaps, self.jump_at, self.jumps))

    @staticmethod
    def of(mask: Tensor) -> Places:
        """Return the places at which a boolean tensor is True."""
        shape = tuple(mask.shape)
        if len(shape) == 1 and len(mask) <= VECTOR:
            indices = mask.nonzero().squeeze(1)
            whole = Block(slice(0, len(mask)), slice(0, len(indices)), slice(0, 0), shape)
            none = indices.new_empty(0, dtype=torch.int32)
            return Places(shape, indices, none, none, (whole,))
        rows = mask.reshape(shape[0] if shape else 1, -1)
        is_whole = rows.numel() <= WHOLE * BLOCK
        many = len(rows) if is_whole else _rows_in_a_block(rows.shape[1])
        gaps, blocks = [], []
        start, jumps_before = 0, 0
        for first in range(0, len(rows), many):
            part = rows[first : first + many]
            indices = part.reshape(-1).nonzero().squeeze(1)
            gap = indices.diff(prepend=indices.new_zeros(1))
            long = int((gap > 255).sum())
            stop = start + gap.numel()
            blocks.append(
                Block(
                    slice(first, first + part.shape[0]),
                    slice(start, stop),
                    slice(jumps_before, jumps_before + long),
                    (part.shape[0], *shape[1:]) if shape else (),
                )
            )
            gaps.append(gap)
            start, jumps_before = stop, jumps_before + long
        return _packed(shape, torch.cat(gaps) if gaps else rows.new_empty(0).long(), blocks)

    def indices(self, block: Block | None = None, *, for_now: bool = False) -> Tensor:
        """Return the places as row-major indices within a block, or within the whole tensor: (n,).

        With `for_now` they are read before the thread asks for others so: see `workspace`.

        Example:
            >>> Places.of(torch.tensor([[True, False], [False, True]])).indices()
            tensor([0, 3])
        """
        if block is None and len(self.blocks) != 1:
            width = math.prod(self.shape[1:])
            return torch.cat([self.indices(b) + b.rows.start * width for b in self.blocks])
        if self.gaps.dtype == torch.int64:
            return self.gaps
        block = self.blocks[0] if block is None else block
        gaps = self.gaps[block.entries]
        make = partial(workspace, "indices") if for_now else torch.empty
        steps = make(tuple(gaps.shape), dtype=torch.int64, device=gaps.device).copy_(gaps)
        if block.jumps.stop > block.jumps.start:
            at = self.jump_at[block.jumps].long() - block.entries.start
            steps.index_add_(0, at, self.jumps[block.jumps].long())
        return steps.cumsum_(0)

    def put(
        self,
        tensor: Tensor,
        values: Tensor,
        dtype: torch.dtype,
        block: Block | None = None,
        at: Tensor | None = None,
        *,
        for_now: bool = False,
    ) -> Tensor:
        """Return a copy of the tensor, or of a block of it, with values at the places.

        Args:
            tensor: of `shape`.
            values: (n,).
            dtype: of the copy.
            block: the rows to copy.
            at: the block's `indices`, where they are known already.
            for_now: whether the copy is read before the thread makes another: see `workspace`.
        """
        given = tensor if block is None or not self.shape else tensor[block.rows]
        values = values if block is None else values[block.entries]
        is_small = for_now and given.numel() <= WHOLE * BLOCK
        make = partial(workspace, "block") if is_small else torch.empty
        flat = make((given.numel(),), dtype=dtype, device=given.device)
        flat.copy_(given.reshape(-1))
        at = self.indices(block, for_now=for_now) if at is None else at
        filled = flat.index_copy_(0, at, values.to(dtype)).reshape(given.shape)
        if given.is_contiguous():
            return filled
        return torch.empty_like(given, dtype=dtype).copy_(filled)  # channels_last, for one

    @torch.no_grad()
    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Write values (n,) into a tensor at the places."""
        if not tensor.is_contiguous():
            tensor.copy_(self.put(tensor, values, tensor.dtype))
            return
        flat, width = tensor.view(-1), math.prod(self.shape[1:])
        for block in self.blocks:
            part = flat[block.rows.start * width :]
            at = self.indices(block, for_now=True)
            part.index_copy_(0, at, values[block.entries].to(tensor.dtype))

    def take(self, tensor: Tensor, block: Block | None = None, at: Tensor | None = None) -> Tensor:
        """Return the entries of a tensor, or of a block of it, at the places: (n,).

        `at` are the block's `indices`, where they are known already.
        """
        # Not `index_select`, which takes one thread whatever there are.
        return tensor.reshape(-1).take(self.indices(block) if at is None else at)

    def dense(self, values: Tensor) -> Tensor:
        """Return a tensor with values (n,) at the places and zeros elsewhere."""
        total = values.new_zeros(math.prod(self.shape))
        return total.index_copy(0, self.indices(), values).reshape(self.shape)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Places:
        """Return the places with their tensors passed through a function, as `Module.to` does."""
        return replace(
            self, gaps=move(self.gaps), jump_at=move(self.jump_at), jumps=move(self.jumps)
        )

    def bits(self) -> Tensor:
        """Return the places as a bitmask, eight entries of the tensor a byte, first one first."""
        mask = np.zeros(math.prod(self.shape), dtype=bool)
        mask[self.indices().cpu().numpy()] = True
        return torch.from_numpy(np.packbits(mask))

    def digest(self) -> int:
        """Return 63 bits that tell these places from others of the same tensor's or another's."""
        content = hashlib.sha256(repr(self.shape).encode())
        content.update(self.bits().numpy().tobytes())
        return int.from_bytes(content.digest()[:8], "little") >> 1


def _rows_in_a_block(width: int) -> int:
    """Return how many rows a block has: a multiple of what convolutions take at a time."""
    rows = max(BLOCK // width, 1)
    return rows - rows % LANES if rows >= LANES else rows


def mask_of_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the booleans that a bitmask of `Places.bits` stands for."""
    mask = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape)).view(bool)
    return torch.from_numpy(mask).to(bits.device).reshape(shape)


def mask_of_indices(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return booleans that are True at row-major indices: the inverse of `Places.indices`."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=indices.device)
    mask[indices.long()] = True
    return mask.reshape(shape)


def _packed(shape: tuple[int, ...], gaps: Tensor, blocks: list[Block]) -> Places:
    jump_at = (gaps > 255).nonzero().squeeze(1)
    if 8 * jump_at.numel() > 3 * gaps.numel():  # bytes of the exceptions, bytes that they save
        empty = gaps.new_empty(0, dtype=torch.int32)
        plain = [replace(block, jumps=slice(0, 0)) for block in blocks]
        return Places(shape, gaps.int(), empty, empty, tuple(plain))
    low = gaps & 255
    jumps = (gaps - low)[jump_at].int()
    return Places(shape, low.to(torch.uint8), jump_at.int(), jumps, tuple(blocks))
