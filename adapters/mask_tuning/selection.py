"""Which weights get scores where only a share of them does: the most important by gradient.

A fresh mask keeps everything, and the gradient of its scores is ∂L/∂m = ∂L/∂W ⊙ W. Its absolute
value, summed over a few batches, is how much the loss would change, to first order, if the weight
were masked in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftune.adapters.base.config import config_of
from graftune.adapters.base.messages import listing
from graftune.adapters.base.sharded import is_sharded
from graftune.adapters.mask_tuning.config import MaskTuningConfig
from graftune.adapters.mask_tuning.layer import MaskTuningLayer


def importance(gradients: Iterable[Tensor], weight: Tensor) -> Tensor:
    """Return Σ_b |∂L_b/∂W ⊙ W|, how important each weight is to some batches.

    Args:
        gradients: ∂L_b/∂W of each batch, in W's shape.
        weight: W.

    Example:
        >>> importance([torch.tensor([1.0, -1.0])], torch.tensor([2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for gradient in gradients:
        total += (gradient * weight).abs()
    return total


def most_important(scores: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
    """Return the places of the largest values in a flattened tensor, increasing.

    Args:
        scores: importance, of any shape; equal values are taken in order.
        count: how many places.
        keep: places that are among them whatever their importance.

    Returns:
        (count,), int32 where that suffices.

    Example:
        >>> most_important(torch.tensor([1.0, 3.0, 2.0]), 2)
        tensor([1, 2], dtype=torch.int32)
    """
    flat = scores.flatten()
    if keep is not None:
        flat = flat.index_fill(0, keep, torch.inf)
    places = torch.sort(flat, descending=True, stable=True).indices[:count].sort().values
    return places.int() if flat.numel() < 2**31 else places


def select(
    model: Any,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    adapter_name: str | None = None,
) -> None:
    """Choose the weights that get scores, for an adapter with `fraction`.

    The base model runs on each batch, in evaluation mode, and the most important weights of each
    tensor get the scores; weights that the adapter masks already keep theirs. While this runs there
    is one float32 number a targeted weight, for the sums, and one tensor's gradient at a time.

    Args:
        model: a `PeftModel` with mask tuning, not wrapped in DDP or FSDP. In a process group the
            sums are those of all processes.
        batches: a few batches of what the adapter will be trained on.
        loss: called as `loss(model, batch)`; returns a scalar with gradients.
        adapter_name: None takes the active adapter.

    Raises:
        ValueError: the adapter has no `fraction`, there are no batches, or no gradient reaches a
            tensor. Nothing is selected then.

    Example:
        ```python
        from graftune.adapters import mask_tuning

        model = graftune.wrap(clip, "mask_tuning", fraction=0.05)
        mask_tuning.select(model, batches, lambda model, batch: model(**batch).loss)
        ```
    """
    adapter = model.active_adapter if adapter_name is None else adapter_name
    if isinstance(adapter, list):
        (adapter,) = adapter
    places = _places(model, adapter)
    weights = [getattr(layer.get_base_layer(), name) for _, layer, name in places]
    with _gradients_of(model, weights) as totals:
        seen = 0
        for batch in batches:
            loss(model, batch).backward()
            seen += 1
    if not seen:
        raise ValueError("there are no batches to select by: give at least one")
    for (name, *_), total in zip(places, totals, strict=True):
        if dist.is_initialized():
            dist.all_reduce(total)
        if not total.any():
            raise ValueError(
                f"no gradient of the loss reaches {name!r}, so its most important weights cannot "
                "be told: leave it out with `exclude_modules`, or check the loss"
            )
    config = config_of(model.peft_config[adapter], MaskTuningConfig)
    assert config is not None  # its layers are there
    for (_, layer, name), total in zip(places, totals, strict=True):
        _select(layer, adapter, name, total, config.init)
    for _, layer, _ in places:
        layer.pending[adapter] = False
    model.zero_grad()


def is_pending(model: nn.Module, adapter: str) -> bool:
    """Say whether an adapter's scores have no places yet."""
    return any(
        layer.pending.get(adapter, False)
        for layer in model.modules()
        if isinstance(layer, MaskTuningLayer)
    )


def _places(model: nn.Module, adapter: str) -> list[tuple[str, MaskTuningLayer, str]]:
    places = [
        (f"{key}.{name}", layer, name)
        for key, layer in model.named_modules()
        if isinstance(layer, MaskTuningLayer)
        for name in layer.own_names(adapter)
        if layer.scores(adapter, name)[1] is not None
    ]
    if not places:
        raise ValueError(
            f"the adapter {adapter!r} has nothing to select: it is none of mask tuning with a "
            "`fraction`, as in graftune.wrap(model, 'mask_tuning', fraction=0.05)"
        )
    sharded = [
        key
        for key, layer, name in places
        if is_sharded(getattr(layer.get_base_layer(), name))
        or not getattr(layer.get_base_layer(), name).numel()
    ]
    if sharded:
        raise ValueError(
            f"weights are spread over processes ({listing(sharded, 3)}): select before FSDP or "
            "DeepSpeed ZeRO-3 shards the model"
        )
    return places


@contextmanager
def _gradients_of(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Let base weights have gradients, which are summed up as importance and freed at once."""
    totals = [importance([], weight) for weight in weights]
    layers = [module for module in model.modules() if isinstance(module, MaskTuningLayer)]
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            stack.callback(setattr, layer, "_disable_adapters", layer._disable_adapters)
            layer._disable_adapters = True
        for module in training:
            stack.callback(setattr, module, "training", True)
            module.training = False
        for weight, total in zip(weights, totals, strict=True):
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
            stack.callback(weight.register_post_accumulate_grad_hook(_adder(total)).remove)
        yield totals


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(importance([weight.grad], weight.detach()))
        weight.grad = None

    return add


@torch.no_grad()
def _select(layer: MaskTuningLayer, adapter: str, name: str, total: Tensor, init: float) -> None:
    """Give the scores their places; what a loaded adapter masks keeps its score."""
    scores, index = layer.scores(adapter, name)
    assert index is not None
    is_fresh = layer.pending[adapter]
    masked = None if is_fresh else index[scores <= layer.threshold[adapter]].long()
    places = most_important(total, index.numel(), masked)
    if dist.is_initialized():
        dist.broadcast(places, 0)  # sums may differ by their rounding
    if not is_fresh:
        before = torch.full_like(total.flatten(), init, dtype=scores.dtype)
        before[index.long()] = scores
        scores = before[places.long()]
    layer.set_scores(adapter, name, scores, places)
