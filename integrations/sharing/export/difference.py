"""An adapter as the difference that it makes to the weights, and adding that to a base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftune.adapters.base.checkpoint import check_fits
from graftune.adapters.base.digest import base_digest, difference
from graftune.adapters.base.messages import listing
from graftune.adapters.base.tuner import BaseModelMismatchError
from graftune.integrations.sharing.export.changes import changes, working_dtype
from graftune.integrations.sharing.export.files import check_is_safetensors, write_tensors
from graftune.integrations.sharing.export.places import (
    base_tensors,
    check_exportable,
    check_no_trained_bias,
    check_readable,
    join,
    method_name,
    stored_dtype,
    trained_in_full,
)
from graftune.integrations.sharing.export.report import ErrorTally, ExportReport


@torch.no_grad()
def export_difference(
    model: PeftModel,
    file: str | Path,
    *,
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> ExportReport:
    """Write ΔW = W_adapted − W of every base tensor that the adapter changes.

    This holds for every adapter that can be merged, additive or not, and for modules trained in
    full. ΔW is computed in float64 (float32 on devices without it) and rounded once.

    Args:
        model: with the adapter; it stays as it is.
        file: a name that ends in `.safetensors`. Its tensors have the names of the bare model;
            its header says what method the adapter has, and has a digest of the base tensors.
        dtype: a floating dtype to store; None is float32, or float64 for a float64 adapter.
        adapter_name: the adapter's name in the model.

    Raises:
        TypeError: `model` is no `PeftModel`, or `dtype` is not floating.
        ValueError: no such adapter; it changes nothing or cannot be merged; the base is quantised;
            a changed tensor is shared with a module that stays as it is. Nothing is written then.

    Example:
        The file is used without graftune in three lines::

            from safetensors.torch import load_file
            for name, change in load_file("difference.safetensors").items():
                weight = model.get_parameter(name).data
                weight.copy_(weight.float() + change)
    """
    check_exportable(model, adapter_name)
    check_no_trained_bias(model, adapter_name, "a difference of weights")
    check_is_safetensors(file)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a floating torch.dtype or None, got {dtype!r}")
    dtype = stored_dtype(model, adapter_name) if dtype is None else dtype
    everything = base_tensors(model)
    tensors: dict[str, Tensor] = {}
    tally, rounding = ErrorTally(), 0.0
    for name, delta in deltas(model, adapter_name):
        tensors[name] = delta.to(dtype)
        error = tensors[name].to(delta.dtype) - delta
        rounding = max(rounding, float(error.abs().max()))
        is_rounded = dtype.itemsize < 4
        squared_error = float(error.square().sum()) if is_rounded else 0.0
        tally.enter(name, squared_error, float(delta.square().sum()))
    if not tensors:
        raise ValueError(
            f"the adapter {adapter_name!r} ({method_name(model, adapter_name)}) changes no weight: "
            "there is nothing to export"
        )
    tensors = once_each(tensors, everything)
    config = model.peft_config[adapter_name]
    metadata = {
        "kind": "weight difference",
        "method": method_name(model, adapter_name),
        "base_model": config.base_model_name_or_path or "",
        "base_digest": base_digest({name: everything[name] for name in tensors}),
    }
    files = write_tensors(file, tensors, metadata)
    return ExportReport(
        "difference", files, len(tensors), tally.exact, tally.errors, tally.error, rounding
    )


def deltas(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and ΔW of every base tensor that the adapter changes, in float64.

    Raises:
        ValueError: base tensors are quantised or not in memory.
    """
    for change in changes(model, adapter):
        check_readable([(change.name, change.base)], "a difference of weights")
        delta = change.delta()
        if delta.any():
            yield change.name, delta
    for name, base, trained in trained_in_full(model, adapter):
        own = dict(base.named_parameters())
        for parameter, tensor in trained.named_parameters():
            before = own[parameter]
            dtype = working_dtype(before)
            delta = tensor.detach().to(dtype) - before.detach().to(dtype)
            if delta.any():
                yield join(name, parameter), delta


def once_each(tensors: dict[str, Tensor], everything: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return changes without repetition where the base model shares a tensor between modules.

    Raises:
        ValueError: a change would reach modules that the adapter leaves alone.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in everything.items():
        names.setdefault(id(tensor), []).append(name)
    for name in tensors:
        others = [other for other in names[id(everything[name])] if other != name]
        left = [
            other
            for other in others
            if other not in tensors or not torch.equal(tensors[other], tensors[name])
        ]
        if left:
            raise ValueError(
                f"the adapter changes {name!r} where it is used there, and the base model shares "
                f"that tensor with {listing(left)}, which would change as well: export the merged "
                "model, in which they are separate; nothing was written"
            )
    first = {id(everything[name]): name for name in reversed(tensors)}
    return {name: tensor for name, tensor in tensors.items() if name in first.values()}


@torch.no_grad()
def apply_difference(
    base: nn.Module,
    file: str | Path,
    *,
    check_base: Literal["error", "warn", "off"] = "error",
) -> nn.Module:
    """Add a difference of weights to a base model, in its place: W ← W + ΔW.

    The sum is made in float32 or better and rounded once to the dtype of W.

    Args:
        base: a bare model of the architecture that the adapter was trained on.
        file: what `export_difference` wrote.
        check_base: what to do when the digest in the file says that it belongs to another base
            model: refuse, warn, or nothing.

    Returns:
        `base`.

    Raises:
        ValueError: not such a file; names or shapes that are not the model's
            (`AdapterMismatchError`); another base model (`BaseModelMismatchError`). The model is
            then as it was.

    Example:
        ```python
        from graftune.integrations.sharing.export import apply_difference

        model = apply_difference(base, "difference.safetensors")
        ```
    """
    if check_base not in ("error", "warn", "off"):
        raise ValueError(f"check_base is 'error', 'warn' or 'off', got {check_base!r}")
    tensors, metadata = _read(Path(file))
    parameters = dict(base.named_parameters(remove_duplicate=False))
    own = {name: tuple(parameters[name].shape) for name in tensors if name in parameters}
    missing = [name for name in tensors if name not in parameters]
    if missing:
        own |= {name: tuple(p.shape) for name, p in parameters.items()}
    check_fits(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    check_readable([(name, parameters[name]) for name in tensors], "adding a difference")
    if check_base != "off":
        _check_digest(
            metadata["base_digest"], {name: parameters[name] for name in tensors}, check_base
        )
    for name, change in tensors.items():
        weight = parameters[name].data
        wide = torch.promote_types(weight.dtype, torch.promote_types(change.dtype, torch.float32))
        weight.copy_(weight.to(wide) + change.to(weight.device, wide))
    return base


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is truncated or corrupt ({error})") from error
    if metadata.get("kind") != "weight difference":
        raise ValueError(
            f"{str(file)!r} is no difference of weights as export_difference writes it. An adapter "
            "is loaded with graftune.load, a LoRA with peft.PeftModel.from_pretrained"
        )
    return tensors, metadata


def _check_digest(recorded: str, tensors: dict[str, Tensor], check_base: str) -> None:
    reason = difference(recorded, base_digest(tensors))
    if reason is None:
        return
    message = (
        f"the difference belongs to another base model than this one: {reason}. Load the base "
        "model it was made from; or, to move it to a sibling checkpoint on purpose, call "
        "apply_difference(..., check_base='warn') or 'off'"
    )
    if check_base == "error":
        raise BaseModelMismatchError(message)
    warnings.warn(message, stacklevel=3)
