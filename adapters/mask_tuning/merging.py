"""What masks do to base weights: the change of each, merging, and merging undone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from graftune.adapters.base.messages import listing

if TYPE_CHECKING:
    _Base = BaseTunerLayer
else:
    _Base = object


class MaskMerging(_Base):
    """The part of a mask tuning layer that deals with its base weights themselves."""

    base_layer: Any
    threshold: dict[str, float]
    pending: dict[str, bool]
    _removed: list[dict[str, tuple[Tensor, Tensor]]]  # places and values, by merge

    if TYPE_CHECKING:  # the layer's

        def adapts(self, name: str, adapter: str) -> bool: ...
        def adapted_names(self, adapters: Iterable[str]) -> list[str]: ...
        def scores(self, adapter: str, name: str) -> tuple[Tensor, Tensor | None]: ...
        def mask(self, adapter: str, name: str) -> Tensor: ...
        def effective(self, name: str, adapters: Sequence[str]) -> Tensor: ...
        def _present(self, adapters: Iterable[str]) -> list[str]: ...

    def get_delta_weight(self, adapter: str, name: str | None = None) -> Tensor:
        """Return W ⊙ mask − W of one parameter, which can be left out if there is only one."""
        names = self.adapted_names([adapter])
        if name is None and len(names) > 1:
            raise ValueError(
                f"the adapter {adapter!r} masks several parameters: name one of {names}"
            )
        return self._delta(adapter, names[0] if name is None else name)

    def _delta(self, adapter: str, name: str) -> Tensor:
        return self.effective(name, [adapter]) - getattr(self.get_base_layer(), name)

    def weight_changes(self, adapter: str) -> dict[str, Callable[[], Tensor]]:
        """Return by base tensor what computes ΔW = W ⊙ mask − W of an adapter with gradients."""
        return {name: partial(self._delta, adapter, name) for name in self.adapted_names([adapter])}

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the base tensors that adapters mask, as they are without any adapter."""
        return {name: self._original(name) for name in self.adapted_names(self.threshold)}

    def _original(self, name: str) -> Tensor:
        tensor = getattr(self.get_base_layer(), name)
        for removed in reversed(self._removed):
            if name in removed:
                tensor = _with(tensor.detach(), *removed[name])
        return tensor

    def check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError if any of the adapters has no selection yet, or scores that are NaN."""
        adapters = self._present(adapter_names)
        if any(self.pending[adapter] for adapter in adapters):
            raise ValueError(selection_pending(adapters, "merging"))
        for adapter in adapters:
            for name in self.adapted_names([adapter]):
                if torch.isnan(self.scores(adapter, name)[0]).any():
                    raise ValueError(_broken([adapter]))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Set the masked base weights to zero, in place: W' = W ⊙ mask.

        Merging adapters one after the other equals merging them together: a weight stays if all of
        them keep it. The values that are masked are kept until `unmerge`, which restores them bit
        for bit.

        Args:
            safe_merge: check that the merged weights are finite before the layer is changed.
            adapter_names: the adapters to merge; None takes the active ones.

        Raises:
            ValueError: scores are NaN, no selection was made, or `safe_merge` found values that
                are not finite. The layer is then as it was.
        """
        adapters = self._present(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        self.check_mergeable(adapters)
        drops = {name: self._dropped(name, adapters) for name in self.adapted_names(adapters)}
        removed = {}
        for name, drop in drops.items():
            weight = getattr(self.get_base_layer(), name).data
            if safe_merge and not torch.isfinite(weight.masked_fill(drop, 0)).all():
                raise ValueError(_broken(adapters))
            places = drop.flatten().nonzero().squeeze(1)  # (K,)
            # Places take half the room in 32 bits, which is enough for nearly all weights.
            small = torch.int32 if drop.numel() < 2**31 else torch.int64
            removed[name] = places.to(small), weight.masked_select(drop)
        for name, drop in drops.items():
            getattr(self.get_base_layer(), name).data.masked_fill_(drop, 0)
        self._removed.append(removed)
        self.merged_adapters = [*self.merged_adapters, *adapters]

    def _dropped(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return where any of the adapters masks a base tensor."""
        drop = torch.zeros((), dtype=torch.bool)
        for adapter in adapters:
            if not self.adapts(name, adapter):
                continue
            drop = ~self.mask(adapter, name) | drop.to(self.scores(adapter, name)[0].device)
        return drop.to(getattr(self.get_base_layer(), name).device)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weights as they were before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for removed in reversed(self._removed):
            for name, (places, values) in removed.items():
                data = getattr(self.get_base_layer(), name).data
                data.copy_(_with(data, places, values))
        self._removed = []
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this layer and without those inside it."""
        inner = list(_inner_layers(self.base_layer))
        for layer in (*(layer for *_, layer in inner), self):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for parent, name, layer in inner:
            setattr(parent, name, layer.base_layer)
        return self.base_layer


def _inner_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, MaskMerging]]:
    for name, child in list(module.named_children()):
        if isinstance(child, MaskMerging):
            yield module, name, child
        yield from _inner_layers(child)


def _with(tensor: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return a copy of a tensor with other values in some places of its flattened form."""
    flat = tensor.flatten().index_copy(
        0, places.to(tensor.device).long(), values.to(tensor.device, tensor.dtype)
    )
    return flat.view(tensor.shape)


def _broken(adapters: Sequence[str]) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be "
        "broken: the training diverged. Use an earlier checkpoint"
    )


def selection_pending(adapters: Sequence[str], what: str) -> str:
    """Return the words for an adapter whose scores have no places yet."""
    return (
        f"{what} with the adapter {listing(adapters)} needs its selection, which is pending: with "
        "`fraction` only the most important weights get scores. Call "
        "graftune.adapters.mask_tuning.select(model, batches, loss) first; graftune.Trainer does "
        "when it starts"
    )
