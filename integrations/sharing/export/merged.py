"""An adapter merged into its base model, in the base model's own format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from graftune.adapters.base.messages import listing
from graftune.adapters.sara import SaraRoot
from graftune.integrations.libraries.families import recognise
from graftune.integrations.sharing.export.changes import changes
from graftune.integrations.sharing.export.files import check_is_no_file, save_tensors, write_folder
from graftune.integrations.sharing.export.places import (
    base_tensors,
    check_exportable,
    check_readable,
    method_name,
    trained_in_full,
    without_wrappers,
)
from graftune.integrations.sharing.export.report import ErrorTally, ExportReport


@torch.no_grad()
def export_merged(
    model: PeftModel, folder: str | Path, *, adapter_name: str = "default"
) -> ExportReport:
    """Write the base model with the adapter merged in, as a model without any adapter.

    Models of transformers and diffusers are saved by their own `save_pretrained`; of others
    (open_clip, timm, any module) the state dict is saved as `model.safetensors`, with the names of
    the bare model. W + ΔW is computed in float64 (float32 on devices without it) and rounded once
    to the dtype of W. Tensors that the base model shares between modules are separate where the
    adapter changes them differently, and the saved config says so.

    Args:
        model: with the adapter; it stays as it is, bit for bit. Only changed tensors are copied.
        folder: where the files shall be; it must not hold weights of another model.
        adapter_name: the adapter's name in the model.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: no such adapter; it cannot be merged; the base is quantised or not in memory.
        FileExistsError: the folder holds other weights. Nothing is written in any of these cases.

    Example:
        ```python
        from graftune.integrations.sharing.export import export_merged
        from transformers import CLIPModel

        export_merged(model, "merged")
        merged = CLIPModel.from_pretrained("merged")
        ```
    """
    check_exportable(model, adapter_name)
    check_is_no_file(Path(folder))
    check_readable(base_tensors(model).items(), "merging")
    bare = bare_copy(model, adapter_name)
    tally, rounding = ErrorTally(), 0.0
    for change in changes(model, adapter_name):
        delta = change.delta()
        wide = change.base.to(delta.dtype) + delta
        value = wide.to(change.base.dtype)
        owner = bare.get_submodule(change.module)
        setattr(owner, change.parameter, nn.Parameter(value, requires_grad=False))
        error = value.to(delta.dtype) - wide
        rounding = max(rounding, float(error.abs().max()))
        is_rounded = value.dtype.itemsize < 4
        squared_error = float(error.square().sum()) if is_rounded else 0.0
        tally.enter(change.name, squared_error, float(delta.square().sum()))
    if not tally.errors and not list(trained_in_full(model, adapter_name)):
        raise ValueError(
            f"the adapter {adapter_name!r} ({method_name(model, adapter_name)}) changes no weight: "
            "there is nothing to merge"
        )
    library = recognise(bare).library
    if library == "transformers":
        _untie(bare)
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        if library in ("transformers", "diffusers"):
            bare.save_pretrained(path)  # type: ignore[operator]
        else:
            save_tensors(path / "model.safetensors", bare.state_dict(), {})
        count = len(bare.state_dict())

    files = write_folder(folder, write)
    return ExportReport("merged", files, count, tally.exact, tally.errors, tally.error, rounding)


def bare_copy(model: PeftModel, adapter: str) -> nn.Module:
    """Return the base model without any of PEFT's layers, with its tensors shared, not copied.

    Modules of `modules_to_save` are the adapter's.
    """
    base = model.get_base_model()
    shared: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=False)
        for tensor in base_tensors(model).values()
    }
    shared |= {id(tensor): tensor.detach() for tensor in base.buffers()}
    bare = copy.deepcopy(base, shared)
    root = SaraRoot.of(bare)
    if root is not None:
        root.leave()
    _unwrap(bare, adapter)
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    return bare


def _unwrap(module: nn.Module, adapter: str) -> None:
    for name, child in list(module.named_children()):
        inner = child
        while isinstance(inner, BaseTunerLayer | ModulesToSaveWrapper):
            is_trained = (
                isinstance(inner, ModulesToSaveWrapper) and adapter in inner.modules_to_save
            )
            inner = inner.modules_to_save[adapter] if is_trained else without_wrappers(inner)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap(inner, adapter)


def _untie(bare: Any) -> None:
    """Separate all shared tensors of a transformers model of which some have become different."""
    parameters = dict(bare.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = bare.get_expanded_tied_weights_keys(all_submodels=True)
    apart = [
        name
        for name, source in tied.items()
        if name in parameters and source in parameters
        if not torch.equal(parameters[name], parameters[source])
    ]
    if not apart:
        return
    # A config has one switch for all: what stays equal has to be written as well.
    for module in bare.modules():
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.config.tie_word_embeddings = False
    for name in {*tied, *tied.values()} & parameters.keys():
        path, _, parameter = name.rpartition(".")
        value = parameters[name].detach().clone()
        setattr(bare.get_submodule(path), parameter, nn.Parameter(value, requires_grad=False))
    if bare.get_expanded_tied_weights_keys(all_submodels=True):
        raise ValueError(
            f"{type(bare).__name__} shares {listing(apart, 3)} with other modules whatever its "
            "config says, and the adapter changes them differently: export a LoRA or the "
            "weights' difference instead; nothing was written"
        )
