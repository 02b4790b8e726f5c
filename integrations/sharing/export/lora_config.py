"""The layers of an exported LoRA as PEFT names them, and the config that makes PEFT build them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from torch import Tensor

from graftune.integrations.sharing.export.lora_slots import Slot
from graftune.integrations.sharing.export.places import join, trained_in_full

PREFIX = "base_model.model."


@dataclass
class LoraLayer:
    """One layer of a LoRA.

    Args:
        slot: where it goes.
        rank: as the config counts it.
        tensors: by their names in the layer.
        parameter: the name of the parameter that it changes by itself, or None.
    """

    slot: Slot
    rank: int
    tensors: dict[str, Tensor]
    parameter: str | None = None

    @property
    def target(self) -> str:
        """What `target_modules` or `target_parameters` call it."""
        return join(self.slot.module, self.parameter) if self.parameter else self.slot.module

    @property
    def is_conv1d(self) -> bool:
        """Whether it is around transformers' Conv1D, which stores (in, out)."""
        return self.slot.kind == "linear" and self.slot.is_in_out


def named_tensors(
    layers: Sequence[LoraLayer], model: PeftModel, adapter: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the LoRA's tensors, and those of modules trained in full, by PEFT's names.

    Layers of several parameters of one module stand around each other, the first innermost.
    """
    around = Counter(layer.slot.module for layer in layers)
    placed: Counter[str] = Counter()
    for layer in layers:
        module = layer.slot.module
        placed[module] += 1
        depth = around[module] - placed[module]
        path = nested_name(module, around) + ".base_layer" * depth
        for name, tensor in layer.tensors.items():
            yield f"{PREFIX}{path}.{name}", tensor
    for module, _, trained in trained_in_full(model, adapter):
        for name, tensor in trained.state_dict().items():
            yield f"{PREFIX}{nested_name(module, around)}.{name}", tensor


def nested_name(module: str, around: Counter[str]) -> str:
    """Return a module's name with one `base_layer` for each layer around a module above it.

    Example:
        >>> nested_name("block.attn.out", Counter({"block.attn": 2}))
        'block.attn.base_layer.base_layer.out'
    """
    parts = module.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]
    layers = [".base_layer" * around[name] for name in above]
    return ".".join(map("".join, zip(parts, [*layers, ""], strict=True)))


def lora_config(
    layers: Sequence[LoraLayer], model: PeftModel, adapter: str, module_names: Sequence[str]
) -> LoraConfig:
    """Return the config with which PEFT builds just these layers.

    Args:
        layers: at least one.
        model: with the adapter that they were made from.
        adapter: its name.
        module_names: names of all the base model's modules.
    """
    own, base = model.peft_config[adapter], model.get_base_model()
    ranks = {layer.target: layer.rank for layer in layers}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets([la.target for la in layers if not la.parameter], module_names),
        target_parameters=[la.target for la in layers if la.parameter] or None,
        fan_in_fan_out=any(layer.is_conv1d for layer in layers),
        modules_to_save=getattr(own, "modules_to_save", None),
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        revision=own.revision,
        inference_mode=True,
    )
    if config.task_type is None:  # as PEFT writes it, for AutoPeftModel
        library = type(base).__module__
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": library}
    return config


def _targets(names: list[str], module_names: Sequence[str]) -> Any:
    """Return `target_modules` that mean just these modules: endings of names where these do."""
    if not names:
        return []
    others = [name for name in module_names if name and name not in names]
    for targets in (_find_minimal_target_modules(names, others), set(names)):
        trial = LoraConfig(target_modules=list(targets))
        found = [name for name in module_names if name and check_target_module_exists(trial, name)]
        if sorted(found) == sorted(names):
            return sorted(targets)
    return "|".join(map(re.escape, sorted(names)))
