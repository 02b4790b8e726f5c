"""How keys and values get in front of an attention's own, whatever computes the attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.base.hooks import HookedLayer, with_hidden

# Keys and values, (n, D) each, the same for all rows of a batch, or (B, n, D), one set a row; D is
# the width of all heads together, and they are used as they are, without the projections.
Prefix = tuple[Tensor, Tensor]


class PrefixLayer(HookedLayer):
    """A layer beside one attention that gives it more keys and values.

    In an attention with linear projections, n tokens enter in front of its input; in the output of
    the projections their keys and values are replaced by the prefix, and the n answers to their
    queries are taken off its output. The attention itself, in whatever kernel, stays as it is. An
    `nn.MultiheadAttention` has a place of its own for further keys and values, behind the
    sequence; the order of keys does not matter to an attention.

    A subclass defines `prefix`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now: Prefix | None = None  # while the attention runs
        self._filled = 0  # how many projections have come by

    @abstractmethod
    def prefix(self) -> Prefix | None:
        """Return keys and values for the attention that is about to run, or None."""

    def hook(self, attention: nn.Module, projections: Sequence[str]) -> None:
        """Hook the prefix into an attention, once.

        Args:
            attention: called with the hidden states, (B, L, D).
            projections: names of the modules in it whose output is keys and values; or of one whose
                output is queries, keys and values, side by side; none in `nn.MultiheadAttention`.
        """
        self.stand_beside(attention)
        if isinstance(attention, nn.MultiheadAttention):
            self.hook_input(attention, self._lend)
            self.hook_output(attention, self._take_back)
            return
        self.hook_input(attention, self._lengthen)
        parts = [[0, 1, 2]] if len(projections) == 1 else [[1], [2]]
        for name, part in zip(projections, parts, strict=True):
            self.hook_output(attention.get_submodule(name), partial(self._fill, part))
        norm = getattr(attention, "k_norm", None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            self.hook_output(norm, self._fill_normed)
        self.hook_output(attention, partial(self._shorten, len(projections)))

    # An attention with linear projections.

    def _lengthen(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._now, self._filled = self.prefix(), 0
        if self._now is None:
            return None
        _check_unmasked([*args, *kwargs.values()][1:])
        count = self._now[0].shape[-2]
        return with_hidden(args, kwargs, partial(_with_empty, count))

    def _fill(self, part: list[int], module: nn.Module, args: Any, output: Tensor) -> Any:
        """Replace the first rows of a projection by its part of (nothing, keys, values)."""
        if self._now is None:
            return None
        self._filled += 1
        keys, values = (_rows(output, each) for each in self._now)  # (B, n, D)
        whole = (torch.zeros_like(keys), keys, values)
        rows = torch.cat([whole[place] for place in part], dim=-1)
        return torch.cat([rows, output[:, rows.shape[1] :]], dim=1)

    def _fill_normed(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Replace keys once more behind a norm of the keys of each head, (B, heads, n + L, d)."""
        if self._now is None:
            return None
        keys = _rows(output, self._now[0]).unflatten(-1, (output.shape[1], -1)).transpose(1, 2)
        return torch.cat([keys, output[:, :, keys.shape[2] :]], dim=2)

    def _shorten(self, projections: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self._now is None:
            return None
        count = self._now[0].shape[-2]
        self._now = None
        if self._filled != projections:
            raise RuntimeError(
                f"{type(module).__name__} does not call its projections as modules, so a prefix "
                "has no way into it: keys and values were not replaced"
            )
        if isinstance(output, tuple):
            weights = [None if w is None else w[:, :, count:, count:] for w in output[1:2]]
            return (output[0][:, count:], *weights, *output[2:])
        return output[:, count:]

    # An `nn.MultiheadAttention`.

    def _lend(self, module: Any, args: Any, kwargs: Any) -> None:
        self._take_back(module)  # what a call that failed has left
        self._now = self.prefix()
        if self._now is None:
            return
        _check_unmasked([*args, *kwargs.values()][3:])
        for name, rows in zip(_OWN_ROWS, self._now, strict=True):
            rows = rows.to(module.out_proj.weight.dtype)
            setattr(module, name, rows[:, None] if rows.ndim == 2 else _RowsOfBatch(rows))

    def _take_back(self, module: nn.Module, args: Any = None, output: Any = None) -> Any:
        for name in _OWN_ROWS:
            setattr(module, name, None)
        now, self._now = self._now, None
        if now is None or output is None or output[1] is None:
            return None
        return output[0], output[1][..., : -now[0].shape[-2]]


# Where `nn.MultiheadAttention` keeps keys and values that are not computed from its input.
_OWN_ROWS = ("bias_k", "bias_v")


class _RowsOfBatch:
    """Rows that differ within a batch, in the place of a tensor that is repeated over it."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def repeat(self, *sizes: int) -> Tensor:
        """Return the rows as the attention has its sequence: (n, B, D)."""
        return self._rows.transpose(0, 1)


def _with_empty(count: int, hidden: Tensor) -> Tensor:
    """(B, L, D) to (B, n + L, D), zeros in front."""
    empty = hidden.new_zeros(hidden.shape[0], count, hidden.shape[2])
    return torch.cat([empty, hidden], dim=1)


def _rows(output: Tensor, rows: Tensor) -> Tensor:
    """Keys or values, (n, D) or (B, n, D), as (B, n, D) in the output's dtype."""
    return rows.to(output.dtype).expand(output.shape[0], -1, -1)


def _check_unmasked(others: Sequence[Any]) -> None:
    """Check that an attention is called with nothing beside queries, keys and values."""
    if any(torch.is_tensor(value) for value in others):
        raise ValueError(
            "the attention was called with a mask or with rotary positions beside its input, which "
            "have no place for a prefix: call the model without an attention mask"
        )
