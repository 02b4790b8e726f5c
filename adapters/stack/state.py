"""Whose tensor is whose: the state of an adapter whose parts are adapters of several methods."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from graftune.adapters.base.modules import without_base_layers
from graftune.adapters.stack.config import method_of, tuner_class


def tensors_of_part(
    model: nn.Module, part: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a model's tensors without those of other methods' layers."""
    foreign = set(_own_names(model, tuner_class(part).tuner_layer_cls))
    return {name: t for name, t in tensors.items() if not _is_under(name, foreign)}


def stored_by_part(part: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors that belong to one method."""
    prefix = tuner_class(part).prefix
    return {name: t for name, t in tensors.items() if _prefix_in(name) == prefix}


def stored_by_none(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors that belong to no method, such as modules trained in full."""
    return {name: t for name, t in tensors.items() if _prefix_in(name) is None}


@cache
def part_class(cls: type[BaseTuner]) -> type[BaseTuner]:
    """Return a tuner class whose tensors are stored by their names in the bare model.

    Of the layers around a method's own, which other methods have put there, its file knows nothing.
    """

    def remove(cls: Any, key: str, adapter_name: str) -> str:
        return super(made, cls)._remove_adapter_name_from_key(bare_name(key), adapter_name)

    made: type[BaseTuner] = type(
        cls.__name__, (cls,), {"_remove_adapter_name_from_key": classmethod(remove)}
    )
    return made


def bare_name(key: str) -> str:
    """Return the name of an adapter's tensor without tuner layers around its layer.

    Example:
        >>> bare_name("mlp.fc1.base_layer.lora_A.default.weight")
        'mlp.fc1.lora_A.default.weight'
    """
    prefix = _prefix_in(key)
    if prefix is None:
        return key
    head, dot, tail = key.rpartition(f".{prefix}")
    return f"{without_base_layers(head)}{dot}{tail}"


def save_parts(
    model: PeftModel, folder: str | Path, *, adapter_name: str = "default"
) -> dict[str, Path]:
    """Save each method of a stack in a folder of its own, as PEFT saves one method.

    A part alone is what its method learned beside the others: on the bare base model it loads
    with `graftune.load` or, a method of PEFT's, with plain PEFT.

    Args:
        model: with an adapter of several methods.
        folder: where the parts' folders shall be, each by its method's name.
        adapter_name: the adapter's name in the model.

    Returns:
        The folders by method.

    Raises:
        TypeError: the adapter is not of several methods.

    Example:
        >>> save_parts(model, "parts")
        {'lora': PosixPath('parts/lora'), 'mask_tuning': PosixPath('parts/mask_tuning')}
    """
    stack: Any = model.peft_config[adapter_name]
    if not hasattr(stack, "parts"):
        raise TypeError(
            f"the adapter {adapter_name!r} is of one method ({method_of(stack)}); save it with "
            "`model.save_pretrained(folder)`"
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    base: Any = model.get_base_model()
    folders = {}
    for part in stack.parts:
        place = Path(folder, method_of(part))
        place.mkdir(parents=True, exist_ok=True)
        own = {**stored_by_none(tensors), **stored_by_part(part, tensors)}
        own = {name: tensor.contiguous() for name, tensor in own.items()}
        save_file(own, place / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(part)
        config.inference_mode = True
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(str(place), auto_mapping_dict=None if part.task_type else mapping)
        folders[method_of(part)] = place
    return folders


def _own_names(model: nn.Module, layer_cls: type) -> Iterator[str]:
    """Yield the names under which tensors of other methods' layers are kept."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, layer_cls):
            continue
        layer: Any = module
        held = (*layer._modules, *layer._parameters, *layer._buffers)
        yield from (f"{name}.{own}" for own in held if own != "base_layer")


def _is_under(name: str, prefixes: set[str]) -> bool:
    while name:
        if name in prefixes:
            return True
        name = name.rpartition(".")[0]
    return False


def _prefix_in(key: str) -> str | None:
    """The prefix of the method that a tensor belongs to: the last one in its name."""
    for segment in reversed(key.split(".")):
        for prefix in _prefixes():
            if segment.startswith(prefix):
                return prefix
    return None


def _prefixes() -> list[str]:
    # Longest first: one may begin as another does.
    return sorted({p for p in PEFT_TYPE_TO_PREFIX_MAPPING.values() if p}, key=len, reverse=True)
