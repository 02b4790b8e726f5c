"""An adapter as a plain LoRA, which PEFT, diffusers and serving engines load by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from graftune.adapters.base.messages import listing
from graftune.integrations.sharing.export.changes import Change, changes
from graftune.integrations.sharing.export.files import check_is_no_file, save_tensors, write_folder
from graftune.integrations.sharing.export.lora_card import lora_card
from graftune.integrations.sharing.export.lora_config import LoraLayer, lora_config, named_tensors
from graftune.integrations.sharing.export.lora_of_pipeline import FILE, pipeline_tensors
from graftune.integrations.sharing.export.lora_slots import NoSlotError, Slot, find_slot
from graftune.integrations.sharing.export.lora_tensors import (
    approximate,
    attention_tensors,
    layer_tensors,
)
from graftune.integrations.sharing.export.low_rank import LowRank
from graftune.integrations.sharing.export.places import (
    check_exportable,
    check_no_trained_bias,
    method_name,
    stored_dtype,
    walk,
)
from graftune.integrations.sharing.export.report import ErrorTally, ExportReport


@dataclass
class _Conversion:
    """What became of the adapter's changes, tensor by tensor."""

    layers: list[LoraLayer] = field(default_factory=list)
    attentions: dict[str, dict[str, LowRank]] = field(default_factory=dict)
    tally: ErrorTally = field(default_factory=ErrorTally)
    without_slot: dict[str, list[str]] = field(default_factory=dict)  # names by reason
    of_full_rank: list[str] = field(default_factory=list)


@torch.no_grad()
def export_lora(
    model: PeftModel,
    folder: str | Path,
    *,
    rank: int | None = None,
    adapter_name: str = "default",
    layout: Literal["peft", "diffusers"] = "peft",
) -> ExportReport:
    """Write an adapter as a plain LoRA in a folder, which loads without graftune.

    A FLoRA adapter of a matrix, ΔW = s U_out G U_inᵀ, is the LoRA B A with B = s U_out G and
    A = U_inᵀ (or G on the other side, where that gives the smaller rank); of a convolution with
    ΔW = s G ×_0 U_0 ×_1 U_1 ..., the LoRA with B = U_0 and the other factors multiplied into A.
    Scales are multiplied into B, so `lora_alpha` equals the rank everywhere. Adapters of other
    methods become the nearest LoRA of a given rank. Modules of `modules_to_save` come along.

    Args:
        model: with the adapter; it stays as it is.
        folder: gets `adapter_config.json`, `adapter_model.safetensors` and `README.md`; in
            diffusers' layout `pytorch_lora_weights.safetensors` and `README.md`.
        rank: the largest rank of a LoRA layer, at least 1. What has a form of that rank is
            exported exactly; for the rest it is the best one, by singular value decomposition of
            ΔW, and the report says how far that is. None: exactly or not at all.
        adapter_name: the adapter's name in the model.
        layout: "peft" for `PeftModel.from_pretrained(base, folder)`, "diffusers" for
            `pipeline.load_lora_weights(folder)`, which looks for other names.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: no such adapter; it has no exact form and no rank is given; PEFT's LoRA, or
            the layout, has no layer for what is adapted. Nothing is written then.
        FileExistsError: the folder holds an adapter of another method, perhaps this one.

    Example:
        ```python
        from graftune.integrations.sharing.export import export_lora
        from peft import PeftModel

        print(export_lora(model, "my-lora").exact)
        model = PeftModel.from_pretrained(base, "my-lora")  # graftune is not needed here
        ```
    """
    check_exportable(model, adapter_name)
    check_no_trained_bias(model, adapter_name, "a LoRA")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"`rank` must be a positive int or None, got {rank!r}")
    if layout not in ("peft", "diffusers"):
        raise ValueError(f"`layout` is 'peft' or 'diffusers', got {layout!r}")
    _check_folder(Path(folder))
    modules = {name: base for name, _, base in walk(model.get_base_model())}
    conversion = _Conversion()
    for change in changes(model, adapter_name):
        _convert(change, modules, rank, conversion)
    _finish(conversion, modules)
    _check(conversion, model, adapter_name)
    dtype = stored_dtype(model, adapter_name)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in named_tensors(conversion.layers, model, adapter_name)
    }
    config = lora_config(conversion.layers, model, adapter_name, list(modules))
    if layout == "diffusers":
        tensors = pipeline_tensors(conversion.layers, tensors, model, adapter_name)

    def write(path: Path) -> None:
        save_tensors(path / (SAFETENSORS_WEIGHTS_NAME if layout == "peft" else FILE), tensors, {})
        if layout == "peft":
            config.save_pretrained(str(path))
        card = lora_card(model.get_base_model(), config, method_name(model, adapter_name), layout)
        (path / "README.md").write_text(card, encoding="utf-8")

    files = write_folder(folder, write)
    return ExportReport(
        format="lora",
        files=files,
        tensors=len(tensors),
        exact=conversion.tally.exact,
        errors=conversion.tally.errors,
        error=conversion.tally.error,
    )


def _check_folder(folder: Path) -> None:
    check_is_no_file(folder)
    try:
        method = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return  # nothing there that could be lost
    if method != PeftType.LORA.value:
        raise FileExistsError(
            f"{str(folder)!r} holds an adapter of the method {method}, which a LoRA would take the "
            "place of: choose another folder"
        )


def _convert(
    change: Change, modules: Mapping[str, nn.Module], rank: int | None, into: _Conversion
) -> None:
    """Convert one change, or note why it cannot be."""
    try:
        slot = find_slot(change, modules)
        form, squared_error, squared_norm = approximate(change, slot, rank)
    except NoSlotError as error:
        into.without_slot.setdefault(str(error), []).append(change.name)
        return
    except LookupError:
        into.of_full_rank.append(change.name)
        return
    into.tally.enter(change.name, squared_error, squared_norm)
    if slot.kind == "attention":
        into.attentions.setdefault(slot.module, {})[change.parameter] = form
        return
    parameter = change.parameter if slot.kind == "parameter" else None
    tensors = layer_tensors(change, slot, form)
    into.layers.append(LoraLayer(slot, form.rank * slot.groups, tensors, parameter))


def _finish(conversion: _Conversion, modules: Mapping[str, nn.Module]) -> None:
    """Put together the parts of attentions, and refuse what LoRA cannot hold at the same time."""
    for name, parts in conversion.attentions.items():
        attention = modules[name]
        assert isinstance(attention, nn.MultiheadAttention)
        rank, tensors = attention_tensors(attention, parts)
        conversion.layers.append(LoraLayer(Slot("attention", name), rank, tensors))
    parameters = [layer.target for layer in conversion.layers if layer.parameter]
    if parameters and any(layer.is_conv1d for layer in conversion.layers):
        reason = (
            "PEFT's LoRA cannot adapt parameters by themselves beside transformers' Conv1D layers"
        )
        conversion.without_slot[reason] = parameters


def _check(conversion: _Conversion, model: PeftModel, adapter: str) -> None:
    method = method_name(model, adapter)
    if conversion.without_slot:
        reasons = "; ".join(
            f"{reason} ({listing(names, 3)})" for reason, names in conversion.without_slot.items()
        )
        raise ValueError(
            f"the adapter {adapter!r} ({method}) cannot be exported as a LoRA: {reasons}. Export "
            "the merged model or the weights' difference instead; nothing was written"
        )
    if conversion.of_full_rank:
        raise ValueError(
            f"the adapter {adapter!r} ({method}) is not a LoRA on "
            f"{listing(conversion.of_full_rank, 3)}: give `rank=` for the nearest LoRA of that "
            "rank, or export the merged model or the weights' difference; nothing was written"
        )
    if not conversion.layers:
        raise ValueError(
            f"the adapter {adapter!r} ({method}) changes no weight: there is nothing to export"
        )
