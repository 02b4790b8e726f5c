"""Reading one picture: files and bytes of any kind to RGB as it is meant to be seen."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftune.integrations.extras import require

if TYPE_CHECKING:
    from PIL import Image


class UnreadableImageError(ValueError):
    """A picture that cannot be read; says which, and why, in one line."""

    def __str__(self) -> str:
        # A data loader's worker hands an error on as its whole traceback; this is its last line.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def open_image(value: Any, name: str | None = None) -> Image.Image:
    """Open a picture as RGB, upright, as a model is to see it.

    The orientation of EXIF is applied, transparency is laid over white, 16-bit grey is scaled to
    8 bits, palettes and CMYK are converted; of an animation it is the first frame.

    Args:
        value: a file; a row of a data set's image column, `{"path": ..., "bytes": ...}`; or a PIL
            image.
        name: what to call the picture in an error, where it has no file name.

    Raises:
        UnreadableImageError: there is no such file, or it is empty, truncated or no picture, or its
            pixels have no one form in 8 bits (floating point, 32 bits).

    Example:
        >>> open_image(load_images("flowers")[0]["image"]).size
        (640, 480)
    """
    file = _file_of(value)
    try:
        return _to_rgb(_decode(value, file))
    except ImportError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        called = file or name or "a picture"
        raise UnreadableImageError(f"{called} cannot be read: {reason}") from error


def _file_of(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    path = value.get("path") if isinstance(value, Mapping) else getattr(value, "filename", None)
    return str(path or "")


def _decode(value: Any, file: str) -> Image.Image:
    image = require("PIL.Image")
    if isinstance(value, image.Image):
        return value
    raw = value.get("bytes") if isinstance(value, Mapping) else None
    if raw is None and not file:
        none = value is None or isinstance(value, Mapping)
        raise ValueError("there is none" if none else f"a {type(value).__name__} is not a picture")
    if raw is None:
        if not Path(file).is_file():
            raise FileNotFoundError("there is no such file")
        raw = Path(file).read_bytes()
    if not raw:
        raise ValueError("the file is empty")
    try:
        return image.open(BytesIO(raw))
    except image.UnidentifiedImageError as error:
        raise ValueError(f"not a picture; the file begins with {raw[:12]!r}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    image, operations = require("PIL.Image"), require("PIL.ImageOps")
    picture.load()
    picture = operations.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating point; convert it to 8 or 16 bits")
    if picture.mode.startswith("I"):
        picture = image.fromarray(_eight_bits(np.asarray(picture)))
    if picture.has_transparency_data:
        white = image.new("RGBA", picture.size, "white")
        picture = image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    wide = pixels.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16 bits")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)
