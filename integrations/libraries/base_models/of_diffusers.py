"""Base models of diffusers: the denoiser of a pipeline, with what its training needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from graftune.adapters.base.messages import listing
from graftune.integrations.extras import require
from graftune.integrations.libraries.base_models.base_model import BaseModel
from graftune.integrations.libraries.base_models.names import Source
from graftune.integrations.sharing.fetch import one_line

_DENOISERS = ("unet", "transformer")


def load_pipeline_part(source: Source, revision: str | None, dtype: str) -> BaseModel:
    """Load a pipeline's denoiser, its scheduler and, where there are any, VAE and text encoder.

    Raises:
        ValueError: no pipeline, one without a scheduler or denoiser, or with several text encoders.
    """
    diffusers = require("diffusers", "diffusers")
    weights = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    index = _index(diffusers, source, revision)
    part = source.part or next((name for name in _DENOISERS if name in index), None)
    if part not in index or "scheduler" not in index:
        raise ValueError(
            f"{source.name} has no {part or 'denoiser'} with a scheduler beside it, which says how "
            f"it was trained; it has {listing(index) or 'no model_index.json'}. Give a pipeline, "
            "as in diffusers:ID/unet"
        )
    encoders = [name for name in index if name.startswith("text_encoder")]
    if len(encoders) > 1:
        raise ValueError(
            f"{source.name} has several text encoders ({listing(encoders)}), for which there is no "
            "ready-made training; write one with graftune.Denoising"
        )

    def load(name: str, key: str = "torch_dtype") -> Any:
        library = transformers if index[name][0] == "transformers" else diffusers
        kind = getattr(library, index[name][1])
        options = {"subfolder": name, "revision": revision, key: weights}
        return kind.from_pretrained(source.name, **options).eval()

    # Whatever scheduler the pipeline samples by, its settings are those of the training.
    scheduler = diffusers.DDPMScheduler.from_pretrained(
        source.name, subfolder="scheduler", revision=revision
    )
    parts: dict[str, Any] = {"scheduler": scheduler}
    tokenizer = None
    if "vae" in index:
        parts["vae"] = load("vae").requires_grad_(False)
    if encoders:
        parts["text_encoder"] = load("text_encoder", "dtype").requires_grad_(False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.name, subfolder="tokenizer", revision=revision
        )
    return BaseModel(load(part), "denoising", tokenizer, parts=parts)


def _index(diffusers: Any, source: Source, revision: str | None) -> dict[str, list[str]]:
    """Return the parts that a pipeline has, with their libraries and classes."""
    try:
        found = diffusers.DiffusionPipeline.load_config(source.name, revision=revision)
    except OSError as error:
        raise OSError(f"{source.name} is no pipeline of diffusers: {one_line(error)}") from error
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, list) and len(entry) == 2 and None not in entry
    }
