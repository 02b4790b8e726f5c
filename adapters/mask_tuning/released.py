"""The byte format of the method's released code: eight mask bits a byte, highest bit first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftune.adapters.base.checkpoint import check_fits
from graftune.adapters.base.config import config_of
from graftune.adapters.base.modules import without_base_layers
from graftune.adapters.mask_tuning.config import MaskTuningConfig
from graftune.adapters.mask_tuning.functional import scores_of
from graftune.adapters.mask_tuning.layer import MaskTuningLayer

ENDING = ".mask_real"


def to_released(mask: Tensor) -> bytes:
    """Return a mask as the released code writes it.

    Args:
        mask: booleans of any shape, True where the weight is kept; taken row by row. The last byte
            is filled up with zero bits.

    Example:
        >>> to_released(torch.tensor([True, False, True]))
        b'\\xa0'
    """
    return np.packbits(mask.detach().cpu().numpy().astype(np.bool_).reshape(-1)).tobytes()


def from_released(data: bytes, shape: Sequence[int]) -> Tensor:
    """Return the mask that the released code wrote as bytes.

    Args:
        data: the bytes.
        shape: the shape of the mask, which they do not hold.

    Raises:
        ValueError: there are more or fewer bytes than such a mask has.

    Example:
        >>> from_released(b"\\xa0", (3,))
        tensor([ True, False,  True])
    """
    size = torch.Size(shape).numel()
    if len(data) != -(-size // 8):
        raise ValueError(
            f"a mask of shape {tuple(shape)} has {-(-size // 8)} bytes, got {len(data)}: it "
            "belongs to another weight"
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=size)
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def export_released(model: nn.Module, adapter_name: str = "default") -> dict[str, bytes]:
    """Return an adapter's masks in the released code's form, which it keeps under "state_dict".

    Args:
        model: the model with the adapter.
        adapter_name: the adapter's name.

    Returns:
        Bytes by "<module>.mask_real" for a module's `weight`, and by
        "<module>.<parameter>.mask_real" for other parameters.

    Example:
        >>> masks = export_released(model)
    """
    return {
        name: to_released(layer.mask(adapter_name, parameter))
        for name, (layer, parameter) in _places(model, adapter_name).items()
    }


def import_released(model: Any, masks: Mapping[str, bytes], adapter_name: str = "default") -> None:
    """Take masks in the released code's form into an adapter that is there.

    The scores themselves are not in that form: they become `init` where a weight is kept and
    2·threshold − init where it is masked.

    Args:
        model: a `PeftModel` with mask tuning.
        masks: bytes by "<module>.mask_real", as `export_released` names them; rename what has other
            names. The released code's pickles are for its own tools to open: graftune reads none.
        adapter_name: the adapter's name.

    Raises:
        ValueError: a mask is missing, foreign or of another size (`AdapterMismatchError`), or the
            adapter has scores for a `fraction` only.

    Example:
        >>> import_released(model, {"visual.conv1.mask_real": data})
    """
    config = config_of(model.peft_config[adapter_name], MaskTuningConfig)
    if config is None:
        raise ValueError(f"the adapter {adapter_name!r} is not of mask tuning")
    if config.fraction is not None:
        raise ValueError(
            "released masks are of whole weights, and this adapter has scores for a share of each: "
            "wrap the model with fraction=None"
        )
    places = _places(model, adapter_name)
    expected = {
        name: (-(-layer.mask(adapter_name, parameter).numel() // 8),)
        for name, (layer, parameter) in places.items()
    }
    check_fits(expected, {name: (len(data),) for name, data in masks.items()})
    for name, (layer, parameter) in places.items():
        scores, _ = layer.scores(adapter_name, parameter)
        mask = from_released(masks[name], scores.shape)
        values = scores_of(mask, config.init, config.threshold, scores.dtype)
        layer.set_scores(adapter_name, parameter, values)


def _places(model: nn.Module, adapter: str) -> dict[str, tuple[MaskTuningLayer, str]]:
    places = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, MaskTuningLayer):
            continue
        module = without_base_layers(key.removeprefix("base_model.model."))
        for parameter in layer.own_names(adapter):
            name = module if parameter == "weight" else f"{module}.{parameter}"
            places[name + ENDING] = layer, parameter
    return places
