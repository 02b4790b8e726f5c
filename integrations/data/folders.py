"""A folder of pictures, one subfolder a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftune.integrations.data.sources import check_split
from graftune.integrations.extras import require

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SPLITS = {"train", "validation", "val", "valid", "dev", "test"}


def class_folder(folder: Path, split: str) -> Dataset:
    """Read the pictures of one split of a folder as files and labels; none is opened.

    Args:
        folder: has one subfolder a class, or subfolders "train", "validation" (or "val") and "test"
            that have. Classes are numbered in alphabetical order, over all splits together.
        split: which of these; a folder without them is "train".

    Raises:
        FileNotFoundError: no pictures in subfolders.
        ValueError: no such split.
    """
    datasets = require("datasets")
    splits = _splits(folder)
    check_split(split, splits)
    found = {name: _pictures(part) for name, part in splits.items()}
    names = sorted({name for files in found.values() for name in files})
    if not names:
        raise FileNotFoundError(
            f"{folder} has no subfolders with pictures ({', '.join(sorted(PICTURES))}); put the "
            "pictures of each class into a subfolder named after the class"
        )
    if not found[split]:
        raise FileNotFoundError(f"{splits[split]} has no pictures, other splits of {folder} have")
    rows = [(str(file), names.index(name)) for name in names for file in found[split].get(name, [])]
    features = {
        "image": datasets.Image(decode=False),
        "label": datasets.ClassLabel(names=names),
    }
    return datasets.Dataset.from_dict(
        {"image": [file for file, _ in rows], "label": [label for _, label in rows]},
        features=datasets.Features(features),
    )


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits: subfolders, or the folder itself as "train"."""
    parts = _subfolders(folder)
    named = parts and all(part.name in _SPLITS for part in parts)
    # A class may be called "train" as well: then the pictures lie directly in it.
    if named and not any(_is_picture(file) for part in parts for file in part.iterdir()):
        return {part.name: part for part in parts}
    return {"train": folder}


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each class that has any, in alphabetical order."""
    files = {
        child.name: sorted(file for file in child.rglob("*") if _is_picture(file))
        for child in _subfolders(folder)
    }
    return {name: found for name, found in files.items() if found}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_picture(file: Path) -> bool:
    # Hidden files are other programs': previews, and what macOS leaves beside a copied picture.
    return file.suffix.lower() in PICTURES and not file.name.startswith(".")
