"""Which parameters a SaRA config targets, and whether they can be trained in part."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from graftune.adapters.base.messages import listing, warn_once
from graftune.adapters.base.modules import base_modules, is_target_parameter
from graftune.adapters.base.sharded import is_sharded
from graftune.adapters.sara.config import SaraConfig
from graftune.adapters.sara.root import can_stand_in

# Their parameters are indexed, not read by name: nothing could stand around these modules.
_INDEXED = (nn.ParameterList, nn.ParameterDict, ParametrizationList)


COMPILED = "_orig_mod."  # what stands before the names of a compiled model's modules

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_target_module(config: SaraConfig, key: str) -> Any:
    """Say whether a module's own parameters are targeted, as PEFT says it for `target_modules`."""
    if not config.takes_everything:
        return check_target_module_exists(config, key)
    fields: dict[str, Any] = {"target_modules": ".*", "target_parameters": None}
    fields["exclude_modules"] = config.exclude_modules
    # PEFT trains a task's new head in full, and says so after the adapter is attached.
    heads = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    fields["modules_to_save"] = [*(config.modules_to_save or ()), *heads]
    return check_target_module_exists(SimpleNamespace(**fields), key)


def is_excluded(found: Any) -> bool:
    """Say whether what `is_target_module` found is that the module is left out by name."""
    return isinstance(found, _ExcludedModule)


def excludes_of_root(config: SaraConfig, model: nn.Module) -> bool:
    """Say whether `exclude_modules` leaves out a parameter that the model itself owns."""
    own = (name for name, _ in model.named_parameters(recurse=False))
    return config.takes_everything and any(is_excluded(is_target_module(config, n)) for n in own)


def target_tensors(config: SaraConfig, model: nn.Module) -> dict[str, Tensor]:
    """Return the targeted tensors by name, once each of them can be trained in part.

    Tensors that several modules share are left out where nothing is named, with a warning.

    Raises:
        ValueError: a named tensor is shared; a tensor is not floating point, quantised, sharded or
            not in memory.
    """
    found = dict(_named(config, model))
    shared = _shared_names(model)
    tied = [name for name, tensor in found.items() if id(tensor) in shared]
    if tied and not config.takes_everything:
        raise ValueError(
            f"cannot train {tied[0]!r} in part: the model has the same tensor as "
            f"{listing(shared[id(found[tied[0]])])} (tied weights), and an entry trained in one "
            "place would stay as it is in the other. Leave it out with `exclude_modules`, or untie "
            "the weights first"
        )
    if tied:
        warn_once(
            f"tied weights: {tied}",
            f"SaRA leaves out {listing(tied)}: the model has them in several places (tied weights)",
        )
    found = {name: tensor for name, tensor in found.items() if name not in tied}
    for name, tensor in found.items():
        _check(name, tensor)
    return found


def _named(config: SaraConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _named_of_root(config, model)
    attentions = set()
    for full_key, module in base_modules(model):
        key = full_key.removeprefix(COMPILED)
        owner, _, own_name = key.rpartition(".")
        is_target = bool(is_target_module(config, key))
        if isinstance(module, nn.MultiheadAttention) and is_target:
            attentions.add(key)
        # An attention reads its output projection and never calls it: the two go together.
        is_target = is_target or (own_name == "out_proj" and owner in attentions)
        if isinstance(module, _INDEXED):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if is_target or is_target_parameter(config, f"{key}.{name}"):
                yield f"{key}.{name}", tensor


def _named_of_root(config: SaraConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the targeted parameters of the model itself; `exclude_modules` may name them."""
    for name, tensor in model.named_parameters(recurse=False):
        is_target = config.takes_everything and bool(is_target_module(config, name))
        if not (is_target or is_target_parameter(config, name)):
            continue
        if can_stand_in(model):
            yield name, tensor
        elif not is_target:
            raise ValueError(
                f"cannot train {name!r} in part: it belongs to the model itself, and a "
                f"{type(model).__name__} runs or counts whatever modules it has, so that the "
                "values have no place. Put the model into a module of your own"
            )
        else:
            warn_once(
                f"parameters of a container: {type(model).__name__}.{name}",
                f"SaRA leaves out {name!r}: it belongs to the model itself, and a "
                f"{type(model).__name__} runs or counts whatever modules it has",
            )


def _shared_names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of tensors that the model has in more than one place, by their identity."""
    names: dict[int, list[str]] = {}
    for name, tensor in _every_tensor(model, ""):
        names.setdefault(id(tensor), []).append(name)
    return {key: places for key, places in names.items() if len(places) > 1}


def _every_tensor(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's parameters with their names; shared modules each time they occur."""
    if isinstance(module, BaseTunerLayer):
        if not hasattr(module, "base_layer"):
            return
        module = module.get_base_layer()
    for own_name, tensor in module._parameters.items():
        if tensor is not None:
            yield f"{name}.{own_name}".lstrip("."), tensor
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _every_tensor(child, f"{name}.{child_name}".lstrip("."))


def _check(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor whose entries cannot be trained one by one."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(
            f"cannot train {name!r} in part: its entries are {tensor.dtype}, integers or quantised "
            "numbers, and SaRA trains floating-point weights where they are. Load the model "
            "without quantisation, or leave the module out with `exclude_modules`"
        )
    if is_sharded(tensor) or hasattr(tensor, "ds_id"):
        raise ValueError(
            f"cannot select from {name!r}: it is spread over processes. Attach the adapter before "
            "the model is sharded"
        )
    if tensor.is_meta:
        raise ValueError(
            f"cannot select from {name!r}: its values are not in memory. SaRA chooses by the "
            "weights' magnitudes; load them before the adapter is attached"
        )
