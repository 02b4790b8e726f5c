"""What an adapter adds to each base tensor: in the adapter's own exact form, or by merging."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.flora import FloraLayer
from graftune.adapters.flora.functional import tucker_weight
from graftune.adapters.sara import SaraRoot
from graftune.adapters.stack import StackConfig, merge_order
from graftune.integrations.sharing.export.low_rank import LowRank
from graftune.integrations.sharing.export.places import (
    check_readable,
    has_adapter,
    join,
    method_name,
    walk,
)


@dataclass(frozen=True)
class Change:
    """ΔW of one base tensor, in one of three forms and in float64 (float32 where there is none).

    Args:
        module: the module's name in the bare model.
        parameter: the tensor's name in the module.
        owner: the module.
        base: the base tensor.
        tucker: core and factors at scale 1, where the adapter has them.
        low_rank: (d_0, d_1 d_2 ⋯), where the adapter is one.
        dense: ΔW itself, where there is no other form.
    """

    module: str
    parameter: str
    owner: nn.Module
    base: Tensor
    tucker: tuple[Tensor, list[Tensor]] | None = None
    low_rank: LowRank | None = None
    dense: Tensor | None = None

    @property
    def name(self) -> str:
        return join(self.module, self.parameter)

    def delta(self) -> Tensor:
        """Return ΔW in the base tensor's shape."""
        if self.tucker is not None:
            return tucker_weight(*self.tucker)
        if self.low_rank is not None:
            return self.low_rank.dense().reshape(self.base.shape)
        assert self.dense is not None
        return self.dense


@torch.no_grad()
def changes(model: PeftModel, adapter: str) -> Iterator[Change]:
    """Yield what the adapter adds to each base tensor, one after the other; the model stays as is.

    FLoRA and plain LoRA give their own factors. Whatever else merges is merged into a copy of its
    layer, and ΔW is the merged weight minus the base weight.

    Raises:
        ValueError: the method cannot be merged, or the base weights are not there to be compared.
    """
    done: list[str] = []
    seen: set[int] = set()
    # Of several methods' layers around one weight only the merged weight says what they do.
    stacked = isinstance(model.peft_config[adapter], StackConfig)
    root = SaraRoot.of(model.get_base_model())
    if root is not None:
        yield from _of_root(root, adapter)
    for name, layer, _ in walk(model.get_base_model()):
        if id(layer) in seen or any(name.startswith(f"{other}.") for other in done):
            continue
        seen.add(id(layer))  # a layer that the model uses in several places counts once
        if not isinstance(layer, BaseTunerLayer) or not any(
            has_adapter(inner, adapter) for inner in layer.modules()
        ):
            continue
        if isinstance(layer, FloraLayer) and not stacked:
            yield from _of_flora(name, layer, adapter)
        elif _is_plain_lora(layer, adapter) and not stacked:
            yield _of_lora(name, layer, adapter)
        else:
            done.append(name)
            yield from _by_merging(name, layer, adapter, method_name(model, adapter))


def _of_root(root: SaraRoot, adapter: str) -> Iterator[Change]:
    for parameter in root.adapted_names([adapter]):
        base = root.base_parameter(parameter)
        delta = root.get_delta_weight(adapter, parameter, working_dtype(base))
        if delta.any():
            yield Change("", parameter, root.owner, base, dense=delta)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute a tensor's ΔW in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _of_flora(name: str, layer: FloraLayer, adapter: str) -> Iterator[Change]:
    base = layer.get_base_layer()
    for parameter in layer.adapted_names([adapter]):
        tensors = layer.tensors(adapter, parameter)
        assert tensors is not None
        core, *factors = (t.to(working_dtype(t)) for t in (tensors[0], *tensors[1]))
        tucker = core * layer.scaling[adapter], factors
        yield Change(name, parameter, base, getattr(base, parameter), tucker=tucker)


def _is_plain_lora(layer: BaseTunerLayer, adapter: str) -> bool:
    kinds = (lora.Linear, lora.Embedding, lora.layer._ConvNd, lora.layer.MultiheadAttention)
    return (
        isinstance(layer, kinds)
        and adapter not in layer.lora_variant
        and not layer.lora_bias.get(adapter, False)
        and getattr(layer.get_base_layer(), "groups", 1) == 1
    )


def _of_lora(name: str, layer: Any, adapter: str) -> Change:
    base = layer.get_base_layer()
    parameter = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a, b = a.to(working_dtype(a)), b.to(working_dtype(b))
    form = LowRank(b.flatten(1) * layer.scaling[adapter], a.flatten(1))
    is_in_out = isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
    return Change(
        name,
        parameter,
        base,
        getattr(base, parameter),
        low_rank=form.mT if is_in_out else form,
    )


def _by_merging(name: str, layer: nn.Module, adapter: str, method: str) -> Iterator[Change]:
    before = {
        (module, parameter): tensor
        for module, _, base in walk(layer, name)
        for parameter, tensor in base._parameters.items()
        if tensor is not None
    }
    named = [(join(*place), tensor) for place, tensor in before.items()]
    check_readable(named, f"exporting {method}")
    merged = _merged_copy(layer, list(before.values()), adapter, method)
    owners = {module: base for module, _, base in walk(merged, name)}
    originals = {module: base for module, _, base in walk(layer, name)}
    for (module, parameter), tensor in before.items():
        after = getattr(owners[module], parameter)
        difference = after.detach() - tensor.detach().to(working_dtype(tensor))
        if difference.any():
            yield Change(module, parameter, originals[module], tensor, dense=difference)


def _merged_copy(layer: nn.Module, tensors: list[Tensor], adapter: str, method: str) -> nn.Module:
    """Return a copy of a tuner layer with the adapter merged, in float64."""
    copies: dict[int, Any] = {
        id(tensor): nn.Parameter(
            tensor.detach().to(working_dtype(tensor), copy=True), requires_grad=False
        )
        for tensor in tensors
    }
    merged = copy.deepcopy(layer, copies)
    for inner in merge_order(merged):
        if has_adapter(inner, adapter):
            try:
                inner.merge(adapter_names=[adapter])
            except NotImplementedError as error:
                raise ValueError(
                    f"{method} cannot be merged into {type(layer).__name__} layers, so it has no "
                    "form without its method"
                ) from error
    return merged
