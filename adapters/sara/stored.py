"""Where an adapter's entries are, in its file: a proof, or on request the places themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import listing
from ..tuner import BaseModelMismatchError
from .layer import SaraLayer
from .places import Places, mask_of_bits, mask_of_indices

PROOF = "sara_places"  # by module: a digest of the places, (1,)
INDICES = "sara_indices"  # by parameter: a bitmask in uint8, or flat indices in int32


def places_tensors(model: nn.Module, adapter_name: str, store_indices: bool) -> dict[str, Tensor]:
    """Return what a file says of the places of an adapter's entries, by the model's names."""
    tensors = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, SaraLayer) or not layer.places.get(adapter_name):
            continue
        key = key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
        places = layer.places[adapter_name]
        if store_indices:
            for name, of_name in places.items():
                tensors[f"{key}.{INDICES}.{adapter_name}.{name}"] = as_stored(of_name)
        else:
            tensors[f"{key}.{PROOF}.{adapter_name}"] = proof(places)
    return tensors


def proof(places: Mapping[str, Places]) -> Tensor:
    """Return a digest of the places in a module's parameters: (1,), int64."""
    mixed = 0
    for name in sorted(places):
        mixed = (mixed * 1_000_003 + places[name].digest()) % 2**63
    return torch.tensor([mixed])


def as_stored(places: Places) -> Tensor:
    """Return places in the smaller of two forms: a bitmask, or flat indices as int32.

    The bitmask is the smaller one above a density of 1/32.
    """
    bits = places.bits()
    if bits.numel() < 4 * places.count or len(places.gaps) == 0:
        return bits
    indices = places.indices().cpu()
    if indices.numel() and int(indices[-1]) >= 2**31:
        return bits
    return indices.int()


def split(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what of a file is about places, and the rest."""
    of_places = {
        key: tensor
        for key, tensor in state_dict.items()
        if f".{PROOF}" in key or f".{INDICES}." in key
    }
    return of_places, {k: t for k, t in state_dict.items() if k not in of_places}


def enter_places(
    layers: Mapping[str, SaraLayer],
    places: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
) -> None:
    """Check a file's places against those of the model, or take them over where it lists them.

    Args:
        layers: the adapter's layers, by the names of their proofs in a file.
        places: the file's tensors about places.
        values: the file's other tensors.
        adapter_name: the adapter.
        config: its config.

    Raises:
        BaseModelMismatchError: the model's own selection gives other places.
        ValueError: the file neither proves nor lists its places, or lists them for other shapes.
    """
    if not any(".sara_values" in key for key in values):
        return  # nothing of this method: said so elsewhere
    if not places:
        raise ValueError(
            "the tensors do not say where their entries are: neither `sara_places` nor "
            "`sara_indices` is among them. Take them from `peft.get_peft_model_state_dict` or a "
            "saved folder"
        )
    prefix = "" if next(iter(layers), "").startswith("base_model.model.") else "base_model.model."
    for key, layer in layers.items():
        named = key if any(k.startswith(key.removesuffix(PROOF)) for k in places) else prefix + key
        listed = {
            name.rpartition(f".{INDICES}.")[2]: tensor
            for name, tensor in places.items()
            if name.startswith(f"{named.removesuffix(PROOF)}{INDICES}.")
        }
        if any(f".{INDICES}." in name for name in places):
            _take_over(layer, adapter_name, listed)
    wrong = [
        key
        for key, layer in layers.items()
        if not any(f".{INDICES}." in name for name in places)
        and not _is_proven(layer, adapter_name, places.get(key, places.get(prefix + key)))
    ]
    if wrong:
        raise BaseModelMismatchError(_message(wrong, len(layers), config))


def _is_proven(layer: SaraLayer, adapter_name: str, found: Tensor | None) -> bool:
    return found is not None and torch.equal(found.cpu(), proof(layer.places[adapter_name]))


def _take_over(layer: SaraLayer, adapter_name: str, listed: Mapping[str, Tensor]) -> None:
    found = {}
    for name, tensor in listed.items():
        weight = getattr(layer.base_layer, name)
        shape, tensor = tuple(weight.shape), tensor.to(weight.device)
        is_bits = tensor.dtype == torch.uint8
        if is_bits and tensor.numel() != -(-weight.numel() // 8):
            raise BaseModelMismatchError(
                f"the file lists entries of {name!r} for a tensor of another size than {shape}"
            )
        mask = mask_of_bits(tensor, shape) if is_bits else mask_of_indices(tensor, shape)
        found[name] = Places.of(mask)
    layer.replace_places(adapter_name, found)


def _message(wrong: list[str], count: int, config: Any) -> str:
    names = [key.removesuffix(f".{PROOF}").removeprefix("base_model.model.") for key in wrong]
    return (
        f"the adapter's entries have other places in this model: in {len(wrong)} of {count} "
        f"modules ({listing(names, 3)}) the selection with {_selection(config)} gives others than "
        "the file was made of. Load the base model it was trained on, in the same dtype, and "
        "attach with the same threshold (or fraction, num_parameters, select, seed and targets); "
        "an adapter saved with store_indices=True brings its places with it"
    )


def _selection(config: Any) -> str:
    names = ("threshold", "fraction", "num_parameters", "select")
    return ", ".join(f"{n}={getattr(config, n)!r}" for n in names if getattr(config, n) is not None)
