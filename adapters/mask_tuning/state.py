"""Between a model's scores and a file's masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.base.checkpoint import AdapterMismatchError
from graftune.adapters.base.messages import listing, warn_once
from graftune.adapters.mask_tuning.coding import MaskFormatError, decode_mask, encode_mask
from graftune.adapters.mask_tuning.functional import mask_of, scores_of
from graftune.adapters.mask_tuning.layer import MaskTuningLayer, selection_pending

SCORES, INDEX, BITS = ("mask_tuning_scores", "mask_tuning_index", "mask_tuning_bits")
# Wrappers whose names a state dict does not have.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")


def encoded(
    model: nn.Module,
    config: Any,
    adapter: str,
    tensors: Mapping[str, Tensor],
    as_scores: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors to save for an adapter: each mask as bytes in the place of its scores.

    Args:
        model: the model with the adapter.
        config: its config.
        adapter: its name.
        tensors: the adapter's tensors by their names in the model's state.
        as_scores: save the scores themselves, for training to go on from.

    Raises:
        ValueError: the selection is pending, or scores are NaN.
    """
    places = _places(model, adapter)
    if any(tensor.is_meta for tensor in tensors.values()):
        return dict(tensors)  # without values, to be loaded yet: there are no masks to encode
    if any(layer.pending[adapter] for layer, _ in places.values()):
        raise ValueError(selection_pending([adapter], "saving"))
    broken = [
        name
        for name, tensor in tensors.items()
        if f".{SCORES}." in name and torch.isnan(tensor).any()
    ]
    if broken:
        raise ValueError(
            f"{len(broken)} scores of the adapter {adapter!r} are NaN ({listing(broken, 3)}): the "
            "training diverged, and nothing was written. Use an earlier checkpoint"
        )
    if as_scores:
        return dict(tensors)
    result = {}
    for name, tensor in tensors.items():
        if f".{SCORES}." in name:
            layer, parameter = places[_without_wrappers(name)]
            index = layer.scores(adapter, parameter)[1]
            shape = layer.full_shape(parameter)
            mask = mask_of(tensor, config.threshold, shape, index)
            result[name.replace(f".{SCORES}.", f".{BITS}.")] = encode_mask(mask)
        elif f".{INDEX}." not in name:
            result[name] = tensor
    return result


def decoded(
    model: nn.Module,
    config: Any,
    adapter: str,
    tensors: Mapping[str, Tensor],
    name_in_file: Callable[[str], str],
) -> dict[str, Tensor]:
    """Return a file's tensors with scores in the place of masks, under the names of the file.

    A file of masks holds of each score only on which side of the threshold it was: `scores_of`
    says what it becomes. Where only a share of a weight has scores, the masked entries are among
    them and the others are the first that are not masked.

    Raises:
        AdapterMismatchError: a mask is damaged, of another shape, or has more zeros than the
            adapter has scores.
    """
    places = {name_in_file(key): place for key, place in _places(model, adapter).items()}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if f".{BITS}." not in name:
            result[name] = tensor
            continue
        try:
            mask = decode_mask(tensor)
        except MaskFormatError as error:
            raise AdapterMismatchError(f"the adapter's tensor {name!r}: {error}") from None
        own = name.replace(f".{BITS}.", f".{SCORES}.")
        plain = _without_wrappers(own)
        place = places.get(plain) or places.get(plain.removeprefix("base_model.model."))
        dtype = torch.float32
        if place is not None:
            layer, parameter = place
            _check_shape(name, tuple(mask.shape), layer.full_shape(parameter))
            scores, index = layer.scores(adapter, parameter)
            dtype = scores.dtype
            if index is not None:
                chosen = _scored(mask, index.numel(), name)
                result[own.replace(f".{SCORES}.", f".{INDEX}.")] = chosen.int()
                mask = mask.flatten()[chosen]
        result[own] = scores_of(mask, config.init, config.threshold, dtype)
    layers = [layer for layer, _ in places.values()]
    _note_loaded(layers, adapter, config, any(f".{BITS}." in name for name in tensors))
    return result


def comparable(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return what two sets of tensors have to agree in, of whichever form: the masks' names."""
    result = {}
    for name, shape in shapes.items():
        if f".{INDEX}." in name:
            continue
        is_mask = f".{SCORES}." in name or f".{BITS}." in name
        result[name.replace(f".{SCORES}.", f".{BITS}.")] = () if is_mask else shape
    return result


def _places(model: nn.Module, adapter: str) -> dict[str, tuple[MaskTuningLayer, str]]:
    """Return the layers of an adapter and their parameters by the scores' names in the state."""
    places = {}
    for key, layer in model.named_modules():
        if isinstance(layer, MaskTuningLayer):
            key = _without_wrappers(key)
            for parameter in layer.own_names(adapter):
                name = f"{SCORES}.{adapter}.{parameter}"
                places[f"{key}.{name}" if key else name] = layer, parameter
    return places


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _check_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if given != expected:
        raise AdapterMismatchError(
            f"the adapter does not fit this base model: {name!r} is the mask of a weight of shape "
            f"{given}, and the model's has {expected}. Load it onto the architecture it was "
            "trained on."
        )


def _scored(mask: Tensor, count: int, name: str) -> Tensor:
    """Return the places of a mask's scores: all zeros, and ones from the start on."""
    flat = mask.flatten()
    zeros = (~flat).nonzero().squeeze(1)
    if zeros.numel() > count:
        raise AdapterMismatchError(
            f"the adapter's tensor {name!r} masks {zeros.numel()} weights, and its `fraction` has "
            f"scores for {count}: the config belongs to another file"
        )
    ones = flat.nonzero().squeeze(1)[: count - zeros.numel()]
    return torch.cat([zeros, ones]).sort().values


def _note_loaded(layers: list[MaskTuningLayer], adapter: str, config: Any, bits: bool) -> None:
    for layer in layers:
        layer.pending[adapter] = False
    if bits and not config.inference_mode:
        warn_once(
            "mask_tuning: bits are trained on",
            "the file holds masks and no scores: training goes on from scores of "
            f"{config.init:g} where a weight is kept and {2 * config.threshold - config.init:g} "
            "where it is masked. To resume a run use its training checkpoint, which holds the "
            "scores: those of graftune.Trainer do",
        )
