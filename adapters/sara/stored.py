"""Where an adapter's entries are, in its file: a proof, or on request the places themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.base.messages import listing
from graftune.adapters.base.tuner import BaseModelMismatchError
from graftune.adapters.sara.places import Places, mask_of_bits, mask_of_indices
from graftune.adapters.sara.values import SaraValues

PROOF = "sara_places"  # by module: a digest of the places, (1,)
_PREFIX = "base_model.model."
INDICES = "sara_indices"  # by parameter: a bitmask in uint8, or flat indices in int32


def places_tensors(model: nn.Module, adapter_name: str, store_indices: bool) -> dict[str, Tensor]:
    """Return what a file says of the places of an adapter's entries, by the model's names."""
    tensors = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, SaraValues) or not layer.places.get(adapter_name):
            continue
        key = key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
        places = layer.places[adapter_name]
        if any(layer.values(adapter_name, name).is_meta for name in places):
            continue  # to be loaded
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


def is_of_places(name: str) -> bool:
    """Say whether a tensor of a file, by its name, is about places and no trained number."""
    return f".{PROOF}" in name or f".{INDICES}." in name


def split(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what of a file is about places, and the rest."""
    of_places = {key: tensor for key, tensor in state_dict.items() if is_of_places(key)}
    return of_places, {k: t for k, t in state_dict.items() if k not in of_places}


def enter_places(
    layers: Mapping[str, SaraValues],
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
    # Models of other libraries hold the layers without PEFT's prefix, which files have.
    found = {key.removeprefix(_PREFIX): tensor for key, tensor in places.items()}
    layers = {key.removeprefix(_PREFIX): layer for key, layer in layers.items()}
    wrong = []
    for key, layer in layers.items():
        head = key.removesuffix(PROOF) + f"{INDICES}."
        listed = {k.removeprefix(head): t for k, t in found.items() if k.startswith(head)}
        if adapter_name not in layer.sara_values:  # waits for them
            layer.update_layer(adapter_name, config, _unpacked(layer, listed))
        elif not _is_same(layer.places[adapter_name], found.get(key), listed):
            wrong.append(key)
    if wrong:
        raise BaseModelMismatchError(_message(wrong, len(layers), config))


def _is_same(
    places: Mapping[str, Places], proven: Tensor | None, listed: Mapping[str, Tensor]
) -> bool:
    if proven is not None:
        return torch.equal(proven.cpu(), proof(places))
    stored = {name: as_stored(of_name) for name, of_name in places.items()}
    return stored.keys() == listed.keys() and all(
        torch.equal(tensor, listed[name].cpu()) for name, tensor in stored.items()
    )


def _unpacked(layer: SaraValues, listed: Mapping[str, Tensor]) -> dict[str, Places]:
    found = {}
    for name, tensor in listed.items():
        weight = layer.base_parameter(name)
        shape, tensor = tuple(weight.shape), tensor.to(weight.device)
        is_bits = tensor.dtype == torch.uint8
        fits = tensor.numel() == -(-weight.numel() // 8) if is_bits else True
        if not fits or (not is_bits and int(tensor.max()) >= weight.numel()):
            raise BaseModelMismatchError(
                f"the file lists entries of {name!r} for a tensor of another size than {shape}: "
                "load the base model it was trained on"
            )
        mask = mask_of_bits(tensor, shape) if is_bits else mask_of_indices(tensor, shape)
        found[name] = Places.of(mask)
    return found


def _message(wrong: list[str], count: int, config: Any) -> str:
    names = [key.removesuffix(f".{PROOF}") for key in wrong]
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
