"""Pictures of every kind become the RGB that they are meant to be, or an error that names them."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graftune.integrations.data.pictures import UnreadableImageError, open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def palette() -> Image.Image:
    picture = Image.new("P", (8, 8))
    picture.putpalette([*RED, 0, 255, 0])
    return picture


def wide(value: int, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype))


KINDS = {
    "palette": (palette(), "png", {}, RED),
    "transparent palette": (palette(), "png", {"transparency": 0}, WHITE),
    "transparent": (Image.new("RGBA", (8, 8), (0, 0, 255, 0)), "png", {}, WHITE),
    "half transparent grey": (Image.new("LA", (8, 8), (0, 128)), "png", {}, (127, 127, 127)),
    "opaque": (Image.new("RGBA", (8, 8), RED), "png", {}, RED),
    "CMYK": (Image.new("RGB", (8, 8), RED).convert("CMYK"), "tiff", {}, RED),
    "CMYK JPEG": (Image.new("RGB", (8, 8), RED).convert("CMYK"), "jpeg", {}, RED),
    "one bit": (Image.new("1", (8, 8), 1), "png", {}, WHITE),
    "grey": (Image.new("L", (8, 8), 7), "png", {}, (7, 7, 7)),
    "16 bits": (wide(0x8000, np.uint16), "png", {}, (128, 128, 128)),
    "16 bits, TIFF": (wide(65535, np.uint16), "tiff", {}, WHITE),
    "GIF": (palette(), "gif", {}, RED),
    "WebP": (Image.new("RGB", (8, 8), RED), "webp", {"lossless": True}, RED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_rgb(kind: str, tmp_path: Path) -> None:
    picture, form, options, expected = KINDS[kind]
    (tmp_path / "picture").write_bytes(encoded(picture, form, **options))
    found = open_image(tmp_path / "picture")
    assert (found.mode, found.size) == ("RGB", (8, 8))
    assert np.abs(np.array(found.getpixel((3, 3))) - expected).max() <= 1


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_picture_is_turned_upright(form: str) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste((0, 0, 255), (0, 0, 20, 20))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the left is up
    found = open_image({"path": None, "bytes": encoded(picture, form, exif=exif)})
    assert found.size == (20, 40)
    assert found.getpixel((10, 5))[2] > 200 > 50 > found.getpixel((10, 35))[2]


def test_broken_exif_is_no_obstacle() -> None:
    raw = encoded(NOISE, "jpeg", exif=b"Exif\0\0garbage")
    assert open_image({"path": None, "bytes": raw}).size == (60, 50)


def test_rows_files_and_pictures_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "noise.png"
    NOISE.save(file)
    rows = ({"path": str(file), "bytes": None}, {"path": "x.png", "bytes": file.read_bytes()})
    for value in (str(file), file, *rows, NOISE, Image.open(file)):
        assert np.array_equal(open_image(value), NOISE)


def half(kind: str) -> Callable[[Path], object]:
    raw = encoded(NOISE, kind)
    return lambda file: file.write_bytes(raw[: len(raw) // 2])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "there is no such file"),
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
    "text": (lambda file: file.write_text("hello there"), r"not a picture.*begins with b'hello"),
    "truncated PNG": (half("png"), "truncated"),
    "truncated JPEG": (half("jpeg"), "truncated"),
    "truncated GIF": (half("gif"), "truncated"),
    "truncated TIFF": (half("tiff"), "truncated"),
    "truncated BMP": (half("bmp"), "truncated"),
    "truncated WebP": (half("webp"), "decoder"),
    "floating point": (lambda file: wide(1, np.float32).save(file, "tiff"), "floating point"),
    "32 bits": (lambda file: wide(70000, np.int32).save(file, "tiff"), "have 32 bits"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    write, reason = BROKEN[what]
    write(tmp_path / "broken.png")
    with pytest.raises(
        UnreadableImageError, match=rf"broken\.png cannot be read: .*{reason}"
    ) as it:
        open_image(tmp_path / "broken.png")
    assert "\n" not in str(it.value)


def test_rows_without_a_file_have_the_name_given() -> None:
    row = {"path": None, "bytes": b"no"}
    with pytest.raises(UnreadableImageError, match=r"^the picture of row 7 cannot be read: not a"):
        open_image(row, "the picture of row 7")
    with pytest.raises(UnreadableImageError, match="a picture cannot be read: there is none"):
        open_image(None)
    with pytest.raises(UnreadableImageError, match="a list is not a picture"):
        open_image([1, 2])
