"""Image data: a folder of pictures, a few of each class, batches of pixels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def require(module: str, extra: str = "train") -> Any:
    """Import a module that comes with an extra.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module!r}, which is not installed: "
            f"pip install 'graftune[{extra}]'"
        ) from error


def image_folder(path: str | Path) -> Dataset:
    """Read a folder with one subfolder of pictures a class.

    Args:
        path: the folder; its subfolders' names are the class names, in alphabetical order.

    Returns:
        A data set with the columns "image" (opened when it is read) and "label";
        `data.features["label"].names` are the class names.

    Raises:
        FileNotFoundError: no such folder, or no pictures in subfolders of it.
        ImportError: the extra `train` is not installed.

    Example:
        >>> data = image_folder("flowers")
        >>> train, rest = few_shot(data["label"], shots=8, seed=0)
        >>> trainer = Trainer(..., train_dataset=data.select(train))
    """
    datasets = require("datasets")
    require("PIL")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give one with a subfolder for each class"
        )
    files = {
        child.name: sorted(f for f in child.rglob("*") if f.suffix.lower() in PICTURES)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    names = [name for name, found in files.items() if found]
    if not names:
        raise FileNotFoundError(
            f"{folder} has no subfolders with pictures ({', '.join(sorted(PICTURES))}); put the "
            "pictures of each class into a subfolder named after the class"
        )
    rows = [(str(file), label) for label, name in enumerate(names) for file in files[name]]
    return datasets.Dataset.from_dict(
        {"image": [file for file, _ in rows], "label": [label for _, label in rows]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        ),
    )


def few_shot(labels: Sequence[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Choose a few examples of each class at random, and return them and the rest as indices.

    Args:
        labels: the label of each example, (N,).
        shots: how many of each class to choose, at least 1.
        seed: decides which; the same seed chooses the same.

    Returns:
        The chosen indices, `shots` for each class, and all others, both in ascending order.

    Raises:
        ValueError: `shots` < 1, or a class has fewer examples than that.

    Example:
        >>> few_shot([0, 0, 1, 1], shots=1, seed=0)
        ([0, 2], [1, 3])
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}; it must be at least 1")
    array = np.asarray(labels)
    classes, counts = np.unique(array, return_counts=True)
    if len(counts) and counts.min() < shots:
        label, count = classes[counts.argmin()], counts.min()
        raise ValueError(
            f"class {label} has {count} examples, fewer than shots = {shots}; lower shots, add "
            "pictures or leave the class out"
        )
    generator = np.random.default_rng(seed)
    chosen = np.concatenate(
        [generator.permutation(np.flatnonzero(array == label))[:shots] for label in classes]
    )
    rest = np.setdiff1d(np.arange(len(array)), chosen)
    return sorted(chosen.tolist()), rest.tolist()


def pixels(images: Sequence[Any], transform: Callable[..., Any]) -> torch.Tensor:
    """Preprocess PIL images for a model: (B, channels, height, width).

    Args:
        images: B PIL images of any size and mode.
        transform: a transformers image processor or processor, or a function from one PIL image to
            one tensor, such as open_clip's and torchvision's.
    """
    rgb = [image.convert("RGB") for image in images]
    processor = getattr(transform, "image_processor", transform)
    if hasattr(processor, "preprocess"):
        return processor(rgb, return_tensors="pt")["pixel_values"]
    return torch.stack([transform(image) for image in rgb])


class ImageCollator:
    """Turn examples with a PIL image and a label into a batch for `ClassNameClassifier`.

    Args:
        transform: see `pixels`.
        image: the column with the images.
        label: the column with the labels; examples may come without it.

    Example:
        >>> ImageCollator(processor)([{"image": picture, "label": 3}])["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
    """

    def __init__(
        self, transform: Callable[..., Any], image: str = "image", label: str = "label"
    ) -> None:
        self.transform = transform
        self.image = image
        self.label = label

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` (B, channels, height, width) and, where given, `labels` (B,)."""
        missing = self.image not in examples[0]
        if missing:
            raise KeyError(
                f"no column {self.image!r} in the data, only {', '.join(map(repr, examples[0]))}; "
                "name the column with the images: ImageCollator(transform, image=...)"
            )
        batch = {"pixel_values": pixels([row[self.image] for row in examples], self.transform)}
        if self.label in examples[0]:
            batch["labels"] = torch.tensor([row[self.label] for row in examples])
        return batch
