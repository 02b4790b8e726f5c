"""The names of base models: which library, and what that library calls the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from graftune.adapters.base.messages import nearest

LIBRARIES = ("transformers", "open_clip", "timm", "diffusers")


@dataclass(frozen=True)
class Source:
    """Where a base model is.

    Args:
        library: one of `LIBRARIES`.
        name: as that library takes it.
        part: open_clip's pretrained weights, a pipeline's subfolder, or a GGUF file's name.
    """

    library: str
    name: str
    part: str | None = None


def locate(name: str) -> Source:
    """Return where the base model of a name is.

    Args:
        name: an id on the Hub or a folder of transformers, or a GGUF file; `open_clip:NAME` or
            `open_clip:NAME/PRETRAINED`; `timm:NAME`; `diffusers:ID` or `diffusers:ID/SUBFOLDER`. A
            folder of one of the other three libraries is recognised by its files.

    Raises:
        ValueError: an unknown library before the colon, or no name after it.

    Example:
        >>> locate("open_clip:ViT-B-32/laion2b_s34b_b79k")
        Source(library='open_clip', name='ViT-B-32', part='laion2b_s34b_b79k')
    """
    path = Path(name).expanduser()
    library, colon, rest = name.partition(":")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return Source("transformers", str(path.parent), path.name)
    if not colon:
        return Source("transformers", name)
    if library not in LIBRARIES or not rest:
        raise ValueError(
            f"{name!r} is no base model.{nearest(library, LIBRARIES)} It is an id on the Hub, a "
            "folder, open_clip:NAME[/PRETRAINED], timm:NAME or diffusers:ID[/SUBFOLDER]."
        )
    if library == "diffusers":
        return _of_pipeline(rest)
    if library == "open_clip" and ":" not in rest:
        model, _, pretrained = rest.partition("/")
        return Source(library, model, pretrained or None)
    return Source(library, rest)


def _of_folder(folder: Path) -> Source:
    if (folder / "open_clip_config.json").is_file():
        return Source("open_clip", f"local-dir:{folder}")
    config = folder / "config.json"
    keys = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if (folder / "model_index.json").is_file() or "_class_name" in keys:
        return _of_pipeline(str(folder))
    if "architecture" in keys and "model_type" not in keys:
        return Source("timm", f"local-dir:{folder}")
    return Source("transformers", str(folder))


def _of_pipeline(name: str) -> Source:
    """Tell a pipeline's name from that of the subfolder with the model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        is_part = (folder.parent / "model_index.json").is_file()
        return (
            Source("diffusers", str(folder.parent), folder.name)
            if is_part
            else Source("diffusers", str(folder))
        )
    parts = name.split("/")
    return Source("diffusers", "/".join(parts[:2]), "/".join(parts[2:]) or None)
