"""Image data: pictures with class labels, and batches of pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.data.folders import class_folder
from graftune.integrations.data.ledger import Ledger
from graftune.integrations.data.pictures import UnreadableImageError, open_image
from graftune.integrations.data.sources import check_column, open_source, saved
from graftune.integrations.extras import require
from graftune.integrations.objectives.labels import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

logger = logging.getLogger(__name__)


def load_images(
    source: Any, *, image: str = "image", label: str = "label", split: str = "train"
) -> Dataset:
    """Load pictures with class labels from wherever they are.

    The pictures stay unopened, as files or bytes: `open_image(data[0]["image"])` opens one as a
    model sees it, `ImageCollator` opens those of a batch, and choosing rows, classes and labels
    opens none. `data.cast_column("image", datasets.Image())` gives PIL images on access instead.

    Args:
        source: a folder with one subfolder a class, or with subfolders "train", "validation" and
            "test" that have one a class; the name of a data set on the Hub; a folder that
            `save_to_disk` wrote; a `datasets.Dataset` or `DatasetDict`.
        image: the column with the pictures, or with their files; a class folder needs no names.
        label: the column with the classes, as class labels, whole numbers or texts. Other than
            class labels are numbered in their order.
        split: which part to load, where there are parts.

    Returns:
        A data set with the columns "image"; "label", whose names are
        `data.features["label"].names`; and "row", the number of the row in the source.

    Raises:
        FileNotFoundError: no such folder or data set, or no pictures in it.
        ValueError: no such column or split, no pictures or no classes in the column.
        TypeError: the source is none of these.
        ImportError: the extra `train` is not installed.

    Example:
        >>> data = load_images("flowers")
        >>> data = load_images("uoft-cs/cifar10", image="img", split="test")
        >>> train, rest = few_shot(data["label"], shots=8, seed=0)
        >>> trainer = Trainer(..., train_dataset=data.select(train))
    """
    require("datasets"), require("PIL")
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    if folder is not None and folder.is_dir() and not saved(folder):
        data = class_folder(folder, split)
    else:
        data = open_source(source, split, "a folder with a subfolder of pictures for each class")
        data = _columns(data, image, label)
    return data.add_column("row", np.arange(len(data)))


def _columns(data: Dataset, image: str, label: str) -> Dataset:
    """Return the two columns under their own names, as unopened pictures and class labels."""
    datasets = require("datasets")
    for name, argument in ((image, "image"), (label, "label")):
        check_column(name, data, argument, "load_images")
    if image == label:
        raise ValueError(f"image and label are both column {image!r}; they are two columns")
    data = data.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    feature = data.features["image"]
    if not isinstance(feature, datasets.Image) and feature not in (
        datasets.Value("string"),
        datasets.Value("binary"),
    ):
        raise ValueError(f"column {image!r} holds {feature}, not pictures or files of pictures")
    return _with_class_labels(data.cast_column("image", datasets.Image(decode=False)), label)


def _with_class_labels(data: Dataset, column: str) -> Dataset:
    """Number the values of the column "label" in their order, with their texts as class names."""
    datasets = require("datasets")
    feature, values = data.features["label"], data["label"][:]
    if None in values:
        raise ValueError(f"column {column!r} has no class in row {values.index(None)}")
    if isinstance(feature, datasets.ClassLabel):
        return data
    if not isinstance(feature, datasets.Value) or feature.dtype.startswith("float"):
        raise ValueError(f"column {column!r} holds {feature}, not one class a picture")
    classes = sorted(set(values))
    number = {value: index for index, value in enumerate(classes)}
    return data.remove_columns("label").add_column(
        "label",
        [number[value] for value in values],
        feature=datasets.ClassLabel(names=[str(value) for value in classes]),
    )


def pixels(images: Sequence[Any], transform: Callable[..., Any]) -> torch.Tensor:
    """Preprocess pictures for a model: (B, channels, height, width).

    Args:
        images: B pictures of any size and kind, see `open_image`.
        transform: a transformers image processor or processor, or a function from one PIL image to
            one tensor, such as open_clip's and torchvision's.

    Raises:
        UnreadableImageError: one of the pictures cannot be read.
    """
    rgb = [open_image(image) for image in images]
    processor = getattr(transform, "image_processor", transform)
    if hasattr(processor, "preprocess"):
        return processor.preprocess(rgb, return_tensors="pt")["pixel_values"]
    return torch.stack([transform(image) for image in rgb])


class ImageCollator:
    """Turn rows with a picture and a label into a batch for `ClassNameClassifier`.

    A picture that cannot be read stops the training in one error that names it. Or it is skipped:
    named in one warning, counted, and replaced by a black picture with the label -100, which losses
    and metrics leave out, so that batches keep their shape and processes stay in step.

    Args:
        transform: see `pixels`.
        image: the column with the pictures, see `open_image`.
        label: the column with the labels; rows may come without it.
        unreadable: "stop" or "skip".

    Raises:
        ValueError: `unreadable` is neither; when called, there is no such column.
        UnreadableImageError: when called, a picture cannot be read and is not to be skipped.

    Example:
        >>> collator = ImageCollator(processor, unreadable="skip")
        >>> collator([{"image": picture, "label": 3}])["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
        >>> collator.unreadable
        []
    """

    def __init__(
        self,
        transform: Callable[..., Any],
        image: str = "image",
        label: str = "label",
        unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        if unreadable not in ("stop", "skip"):
            raise ValueError(
                f"unreadable is {unreadable!r}; it is 'stop' or 'skip'."
                f"{nearest(str(unreadable), ['stop', 'skip'])}"
            )
        self.transform = transform
        self.image = image
        self.label = label
        self._skipped = Ledger() if unreadable == "skip" else None

    @property
    def unreadable(self) -> list[str]:
        """The pictures skipped so far, each once, by this process and its loader's workers."""
        return self._skipped.names() if self._skipped else []

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` (B, channels, height, width) and, where given, `labels` (B,)."""
        if self.image not in examples[0]:
            columns = list(examples[0])
            raise ValueError(
                f"no column {self.image!r} in the data, only {listing(columns)}."
                f"{nearest(self.image, columns)} Name it: ImageCollator(transform, image=...)"
            )
        pictures = [self._open(row, place) for place, row in enumerate(examples)]
        batch = {"pixel_values": pixels(_in_place_of_none(pictures), self.transform)}
        if self.label in examples[0]:
            rows = zip(examples, pictures, strict=True)
            labels = [IGNORED if picture is None else row[self.label] for row, picture in rows]
            batch["labels"] = torch.tensor(labels)
        return batch

    def _open(self, row: Mapping[str, Any], place: int) -> Image.Image | None:
        name = f"the picture of row {row['row']}" if "row" in row else f"picture {place} of a batch"
        try:
            return open_image(row[self.image], name)
        except UnreadableImageError as error:
            if self._skipped is None:
                raise UnreadableImageError(
                    f"{error}; mend or remove it, or leave such pictures out with "
                    "ImageCollator(..., unreadable='skip')"
                ) from error
            if self._skipped.add(str(error)):
                logger.warning("%s; it is left out (%d so far)", error, len(self.unreadable))
            return None


def _in_place_of_none(pictures: Sequence[Image.Image | None]) -> list[Image.Image]:
    """Return the pictures with black ones in the places of those that are missing."""
    sizes = [picture.size for picture in pictures if picture is not None]
    black = require("PIL.Image").new("RGB", sizes[0] if sizes else (224, 224))
    return [picture or black for picture in pictures]
