"""A LoRA as diffusers' pipelines load it: one file, in which names begin with the model's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch import Tensor

from graftune.adapters.base.messages import listing
from graftune.integrations.libraries.pipelines import pipeline_part
from graftune.integrations.sharing.export.lora_config import PREFIX, LoraLayer
from graftune.integrations.sharing.export.places import trained_in_full

FILE = "pytorch_lora_weights.safetensors"  # as `pipeline.load_lora_weights(folder)` looks for it


def pipeline_tensors(
    layers: Sequence[LoraLayer], tensors: Mapping[str, Tensor], model: PeftModel, adapter: str
) -> dict[str, Tensor]:
    """Return a LoRA's tensors by the names that diffusers' pipelines know.

    Ranks are told from the shapes there, and every `lora_alpha` is the rank, as it is here.

    Args:
        layers: of the LoRA.
        tensors: by PEFT's names.
        model: with the adapter that it was made from.
        adapter: its name.

    Raises:
        ValueError: the base is no unet or transformer of diffusers, or the LoRA has more than
            that form holds: other layers than linear ones and convolutions without groups, or
            modules trained in full.
    """
    base = type(model.get_base_model())
    part = pipeline_part(base.__name__) if base.__module__.startswith("diffusers.") else None
    if part is None:
        raise ValueError(
            f"layout='diffusers' is for a unet or transformer of diffusers, and the base model is "
            f"a {base.__name__}: leave `layout` out, or give 'peft'; nothing was written"
        )
    others = [
        layer.target
        for layer in layers
        if layer.slot.kind not in ("linear", "conv") or layer.slot.groups > 1
    ]
    others += [name for name, _, _ in trained_in_full(model, adapter)]
    if others:
        raise ValueError(
            f"a LoRA of diffusers holds linear layers and convolutions without groups, and this "
            f"adapter changes {listing(others, 3)}: leave `layout` out, or export the merged "
            "model; nothing was written"
        )
    return {f"{part}.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
