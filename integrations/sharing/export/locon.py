"""An adapter as a LyCORIS LoCon file, as kohya's scripts, LyCORIS and image generators read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from graftune.adapters.base.layer_types import CONVOLUTIONS, runs_as_defined
from graftune.adapters.base.messages import listing
from graftune.integrations.libraries.families import recognise
from graftune.integrations.sharing.export.changes import Change, changes
from graftune.integrations.sharing.export.files import check_is_safetensors, write_tensors
from graftune.integrations.sharing.export.lora_tensors import exact_form
from graftune.integrations.sharing.export.low_rank import LowRank, best, reduced
from graftune.integrations.sharing.export.places import (
    check_exportable,
    check_no_trained_bias,
    method_name,
    stored_dtype,
    trained_in_full,
    walk,
)
from graftune.integrations.sharing.export.report import ErrorTally, ExportReport

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


@torch.no_grad()
def export_locon(
    model: PeftModel,
    file: str | Path,
    *,
    rank: int | None = None,
    prefix: str | None = None,
    adapter_name: str = "default",
) -> ExportReport:
    """Write an adapter as a LyCORIS LoCon, in Tucker form where a convolution's kernel is wide.

    A FLoRA adapter of a convolution, ΔW = s G ×_0 U_0 ×_1 U_1 ×_2 U_2 ..., is the chain of
    `lora_down` = U_1ᵀ, `lora_mid` = s G ×_2 U_2 ... and `lora_up` = U_0 exactly; where the two
    ranks differ, the smaller gets zeros up to the other, as LoCon has one. Linear layers and
    kernels of one position are `lora_down` and `lora_up` alone. `alpha` is 1 everywhere, as some
    readers take one for all layers, and `lora_up` makes up for it. Strides, groups and dilation
    are the layer's own. (diffusers reads such files without `lora_mid` only: a LoRA is for it.)

    Args:
        model: with the adapter; it stays as it is.
        file: a name that ends in `.safetensors`.
        rank: the largest rank, for what has no exact form, as in `export_lora`. Tucker forms are
            exact and are not cut.
        prefix: of the layers' names, which follow with `_` in the place of `.`. None:
            "lora_unet" for a model of diffusers, "lora_te" for a text encoder of transformers,
            as kohya's scripts name them, and "lycoris", as LyCORIS names those of any model.
        adapter_name: the adapter's name in the model.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: LoCon has no form for a layer; no exact one and no rank is given; modules are
            trained in full, for which it has no place. Nothing is written then.

    Example:
        ```python
        from graftune.integrations.sharing.export import export_locon
        from lycoris import create_lycoris_from_weights

        export_locon(model, "style.safetensors", prefix="lycoris")
        network, _ = create_lycoris_from_weights(1.0, "style.safetensors", base)
        network.apply_to()
        ```
    """
    check_exportable(model, adapter_name)
    check_no_trained_bias(model, adapter_name, "a LoCon")
    check_is_safetensors(file)
    _check_nothing_in_full(model, adapter_name)
    base = model.get_base_model()
    modules = {name: module for name, _, module in walk(base)}
    prefix = _default_prefix(base) if prefix is None else prefix
    tally = ErrorTally()
    tensors: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {}
    dtype = stored_dtype(model, adapter_name)
    for change in changes(model, adapter_name):
        reason = _why_no_locon(change, modules)
        layer = None if reason else _layer(change, rank)
        if layer is None:
            problems.setdefault(reason or _OF_FULL_RANK, []).append(change.name)
            continue
        values, squared_error, squared_norm = layer
        tally.enter(change.name, squared_error, squared_norm)
        name = f"{prefix}_{change.module}".replace(".", "_")
        tensors |= {f"{name}.{key}": value.to(dtype) for key, value in values.items()}
    _check(problems, tensors, model, adapter_name)
    _check_names(tensors, prefix, modules)
    metadata = {"ss_network_module": "lycoris.kohya"}
    files = write_tensors(file, tensors, metadata)
    return ExportReport("locon", files, len(tensors), tally.exact, tally.errors, tally.error)


_OF_FULL_RANK = "the change has no exact low rank: give `rank=` for the nearest LoCon of that rank"


def _layer(change: Change, rank: int | None) -> tuple[dict[str, Tensor], float, float] | None:
    """Return one LoCon layer, ‖error‖² and ‖ΔW‖²; None without a rank where one is needed."""
    _, _, *kernel = change.base.shape
    if change.tucker is not None and any(size != 1 for size in kernel):
        values = tucker_layer(*change.tucker)
        return values, 0.0, float(change.delta().square().sum())
    exact = exact_form(change)
    if exact is not None:
        form, squared_error = (exact, 0.0) if rank is None else reduced(exact, rank)
        return _flat_layer(form, change.base.shape), squared_error, exact.squared_norm()
    if rank is None:
        return None
    delta = change.delta()
    form, squared_error = best(delta.flatten(1), rank)
    return _flat_layer(form, delta.shape), squared_error, float(delta.square().sum())


def tucker_layer(core: Tensor, factors: list[Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a Tucker LoCon layer.

    Args:
        core: G, (r_out, r_in, *r_kernel), with the scale in it.
        factors: U_out (d_out, r_out), U_in (d_in, r_in), then one for each kernel axis.

    Returns:
        With r = max(r_out, r_in): "lora_up.weight" (d_out, r, 1...), "lora_down.weight"
        (r, d_in, 1...), "lora_mid.weight" (r, r, *kernel) and "alpha" = 1. A reader multiplies
        by alpha / r, which "lora_up.weight" has the inverse of.
    """
    up, down, *others = factors
    mid = core
    for factor in others:
        mid = mid.movedim(2, -1) @ factor.mT  # after all of them the axes are in order again
    rank = max(core.shape[:2])
    ones = (1,) * len(others)
    # F.pad counts axes from the last: none for the kernel's, then r_in, then r_out.
    sides = (0, 0) * len(others) + (0, rank - core.shape[1], 0, rank - core.shape[0])
    return {
        "lora_up.weight": rank * F.pad(up, (0, rank - up.shape[1])).reshape(-1, rank, *ones),
        "lora_down.weight": F.pad(down, (0, rank - down.shape[1])).mT.reshape(rank, -1, *ones),
        "lora_mid.weight": F.pad(mid, sides),
        "alpha": torch.tensor(1.0),
    }


def _flat_layer(form: LowRank, shape: torch.Size) -> dict[str, Tensor]:
    out, _, *kernel = shape
    return {
        "lora_up.weight": form.rank * form.up.reshape(out, form.rank, *(1,) * len(kernel)),
        "lora_down.weight": form.down.reshape(form.rank, -1, *kernel),
        "alpha": torch.tensor(1.0),
    }


def _why_no_locon(change: Change, modules: Mapping[str, nn.Module]) -> str | None:
    """Say why LyCORIS cannot run a LoCon on this tensor, or return None."""
    owner = change.owner
    parent = modules[change.module.rpartition(".")[0]]
    if isinstance(owner, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return "LoCon does not reach the weights of nn.MultiheadAttention, which calls no layer"
    if change.parameter != "weight":
        return "LoCon changes the weights of layers only, not other tensors by themselves"
    if not isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"LoCon has no form for {type(owner).__name__}"
    if not runs_as_defined(owner):
        return f"{type(owner).__name__} computes in a way of its own, which LoCon does not know"
    if isinstance(owner, CONVOLUTIONS) and owner.padding_mode != "zeros":
        return "LoCon pads with zeros only"
    return None


def _default_prefix(base: nn.Module) -> str:
    if recognise(base).library == "diffusers":
        return "lora_unet"
    return "lora_te" if type(base).__name__ in _TEXT_ENCODERS else "lycoris"


def _check_nothing_in_full(model: PeftModel, adapter: str) -> None:
    names = [name for name, _, _ in trained_in_full(model, adapter)]
    if names:
        raise ValueError(
            f"modules are trained in full ({listing(names, 3)}, `modules_to_save`), and a LoCon "
            "has no place for them: export a LoRA, the merged model or the weights' difference "
            "instead"
        )


def _check(
    problems: dict[str, list[str]], tensors: dict[str, Tensor], model: PeftModel, adapter: str
) -> None:
    method = method_name(model, adapter)
    if problems:
        reasons = "; ".join(f"{reason} ({listing(names, 3)})" for reason, names in problems.items())
        raise ValueError(
            f"the adapter {adapter!r} ({method}) cannot be exported as a LoCon: {reasons}. Or "
            "export the merged model or the weights' difference; nothing was written"
        )
    if not tensors:
        raise ValueError(
            f"the adapter {adapter!r} ({method}) changes no weight: there is nothing to export"
        )


def _check_names(tensors: dict[str, Tensor], prefix: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise where two modules have one name, once their dots are underscores."""
    count = Counter(f"{prefix}_{name}".replace(".", "_") for name in modules)
    twice = sorted({key.partition(".")[0] for key in tensors if count[key.partition(".")[0]] > 1})
    if twice:
        raise ValueError(
            f"a LoCon names layers with `_` in the place of `.`, and {listing(twice, 3)} would "
            "mean several modules of this model: export a LoRA instead; nothing was written"
        )
