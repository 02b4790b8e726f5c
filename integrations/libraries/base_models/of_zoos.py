"""Base models of open_clip and timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.extras import require
from graftune.integrations.libraries.base_models.base_model import BaseModel
from graftune.integrations.libraries.base_models.heads import name_of_head, new_outputs
from graftune.integrations.libraries.base_models.names import Source


def load_open_clip(source: Source, dtype: str) -> BaseModel:
    """Load a model of open_clip, its tokenizer and its transform of pictures."""
    open_clip = require("open_clip", "open-clip")
    if ":" not in source.name:  # else a place on the Hub, or a folder
        _check_known("open_clip has no model", source.name, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(source.name)
        if source.part is not None and not Path(source.part).is_file():
            _check_known(f"{source.name} has no pretrained weights", source.part, tags)
    model, _, transform = open_clip.create_model_and_transforms(source.name, pretrained=source.part)
    tokenizer = open_clip.get_tokenizer(source.name)
    return BaseModel(model.to(_torch_dtype(dtype)).eval(), "class_names", tokenizer, transform)


def load_timm(
    source: Source, dtype: str, class_names: Sequence[str] | None, head: str | None
) -> BaseModel:
    """Load a pretrained model of timm and its transform of pictures; see `load_base_model`."""
    timm, data = require("timm", "timm"), require("timm.data", "timm")
    if ":" not in source.name and not timm.is_model(source.name):
        _check_known("timm has no model", source.name, timm.list_models())
    model = timm.create_model(source.name, pretrained=True)
    outputs, new_head = tuple(class_names or ()), None
    if class_names is not None:
        known = list(model.pretrained_cfg.get("label_names") or ())
        if new_outputs(source.name, class_names, known, model.num_classes, head):
            model.reset_classifier(len(class_names))
            new_head = name_of_head(model)
        elif known:
            outputs = tuple(known)
    settings = data.resolve_model_data_config(model)
    return BaseModel(
        model.to(_torch_dtype(dtype)).eval(),
        "image_classes",
        transform=data.create_transform(**settings, is_training=False),
        outputs=outputs,
        new_head=new_head,
    )


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r}.{nearest(name, known)} There are {listing(known)}.")


def _torch_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)
