"""Fetch emoji sets as SVG, draw every emoji of every set at 48 px, and write the embedded pictures.

    python examples/pretraining/fetch_pictures.py --downloads /tmp/emoji

Needs the `npm` command and `pip install resvg-py pillow`. Written are one lossless WebP sheet and
one licence note per set, and `index.json` with the names of all emoji, under
`examples/embedded/pictures`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

PICTURES = Path(__file__).resolve().parents[1] / "embedded" / "pictures"
NAMES = "emoji-datasource@16.0.0"
SIZE = 48
COLUMNS = 40


@dataclass(frozen=True)
class Source:
    """Where a style comes from and under which terms it is passed on."""

    package: str
    author: str
    licence: str
    url: str
    share_alike: bool = False


CC_BY = "CC-BY-4.0"
CC_BY_SA = "CC-BY-SA-4.0"
APACHE = "Apache-2.0"
_NOTO = "https://github.com/googlefonts/noto-emoji"
_ONE = "https://github.com/EmojiTwo/emojitwo"
_FLUENT = "https://github.com/microsoft/fluentui-emoji"
STYLES = {
    "noto": Source("noto@1.2.9", "Google Inc", APACHE, _NOTO),
    "noto-v1": Source("noto-v1@1.2.5", "Google Inc", APACHE, _NOTO),
    "fxemoji": Source("fxemoji@1.2.2", "Mozilla", APACHE, "https://mozilla.github.io/fxemoji"),
    "fluent-emoji": Source("fluent-emoji@1.2.7", "Microsoft Corporation", "MIT", _FLUENT),
    "fluent-emoji-flat": Source("fluent-emoji-flat@1.2.6", "Microsoft Corporation", "MIT", _FLUENT),
    "fluent-emoji-high-contrast": Source(
        "fluent-emoji-high-contrast@1.2.6", "Microsoft Corporation", "MIT", _FLUENT
    ),
    "twemoji": Source("twemoji@1.2.5", "Twitter", CC_BY, "https://github.com/twitter/twemoji"),
    "emojione": Source("emojione@1.2.3", "Emoji One", CC_BY, _ONE),
    "emojione-monotone": Source("emojione-monotone@1.2.1", "Emoji One", CC_BY, _ONE),
    "streamline-emojis": Source(
        "streamline-emojis@1.2.4",
        "Streamline",
        CC_BY,
        "https://github.com/webalys-hq/streamline-vectors",
    ),
    "emojione-v1": Source("emojione-v1@1.2.3", "Emoji One", CC_BY_SA, _ONE, share_alike=True),
    "openmoji": Source(
        "openmoji@1.2.29", "OpenMoji", CC_BY_SA, "https://openmoji.org", share_alike=True
    ),
}

# Code points that differ only in who is shown. Emoji equal after this are one group.
_ZERO_WIDTH = {"fe0f", "200d"}
_PERSON = {"1f468", "1f469", "1f9d1"}
_DROPPED = {"2640", "2642", "27a1", "2194", "2195"}
_ALIKE = {
    "older person": {"1f474", "1f475", "1f9d3"},
    "child": {"1f466", "1f467", "1f9d2"},
    "royalty": {"1f934", "1f478", "1fac5"},
    "claus": {"1f385", "1f936", "person-1f384"},
    "holding hands": {"1f46b", "1f46c", "1f46d", "person-1f91d-person"},
    "couple with heart": {"1f491", "person-2764-person"},
    "kiss": {"1f48f", "person-2764-1f48b-person"},
    "dancing": {"1f57a", "1f483"},
    "pregnant": {"1f930", "1fac3", "1fac4"},
    "person": {"person", "1f471", "1f9d4", *(f"person-1f9b{i}" for i in range(4))},
}
_CLOCKS = range(0x1F550, 0x1F568)
_FAMILY = re.compile(r"1f46a|person(-person)?(-1f46[67]|-1f9d2){1,2}")


def fetch(packages: list[str], folder: Path) -> dict[str, Path]:
    """Download and unpack npm packages that are not there yet; `package -> folder of its files`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in packages:
        target = folder / re.sub(r"\W+", "-", package).strip("-")
        if not target.exists():
            packed = subprocess.run(
                ["npm", "pack", "--silent", package],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
            with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
                texts = [m for m in archive.getmembers() if not m.name.endswith(".png")]
                archive.extractall(target, members=texts, filter="data")
        found[package] = target / "package"
    return found


def plain(name: str) -> str:
    """A name reduced to letters and digits, as the sets differ in everything else."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def code(unified: str) -> str:
    """Code points in lower case without the variation selector."""
    return "-".join(part for part in unified.lower().split("-") if part != "fe0f")


def group_of(unified: str) -> str:
    """The key shared by man, woman and person variants, facing directions and the clock faces."""
    parts = [p for p in unified.lower().split("-") if p not in _ZERO_WIDTH | _DROPPED]
    if not parts:  # an arrow is made of a code point that only turns others
        return code(unified)
    if len(parts) == 1 and int(parts[0], 16) in _CLOCKS:
        return "clock face"
    key = "-".join("person" if p in _PERSON else p for p in parts)
    if _FAMILY.fullmatch(key):
        return "family"
    return next((name for name, keys in _ALIKE.items() if key in keys), key)


def read_emoji(names: Path, icon_names: list[dict[str, str]]) -> list[dict[str, Any]]:
    """All emoji but flags and skin tones, each with every name it is known by."""
    known: list[dict[str, Any]] = []
    for entry in json.loads((names / "emoji.json").read_text()):
        if entry["category"] in ("Flags", "Component"):
            continue
        key = code(entry["unified"])
        icons = [table[key] for table in icon_names if key in table]
        spoken = [name.replace("-", " ") for name in icons]
        short = [name.replace("_", " ").replace("-", " ") for name in entry["short_names"]]
        official = entry["name"].lower()
        known.append(
            {
                "id": key,
                "name": spoken[0] if spoken else official,
                "other_names": list(dict.fromkeys([*spoken[1:], official, *short])),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "group": group_of(entry["unified"]),
                "sort_order": entry["sort_order"],
            }
        )
    known.sort(key=lambda emoji: emoji.pop("sort_order"))
    for emoji in known:
        emoji["other_names"] = [n for n in emoji["other_names"] if n != emoji["name"]]
    return known


def resolve(icons: dict[str, Any], name: str) -> dict[str, Any]:
    """An icon's body and transformations, through its chain of aliases."""
    if name in icons["icons"]:
        return icons["icons"][name]
    alias = icons["aliases"][name]
    return {**resolve(icons, alias["parent"]), **{k: v for k, v in alias.items() if k != "parent"}}


def find_icons(package: Path, emoji: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """`emoji index -> icon` by code point where the set lists them, otherwise by name."""
    icons = json.loads((package / "icons.json").read_text())
    by_name = {plain(n): n for n in [*icons.get("aliases", {}), *icons["icons"]]}
    chars = package / "chars.json"
    by_code = (
        {code(k): v for k, v in json.loads(chars.read_text()).items()} if chars.exists() else {}
    )
    found: dict[int, str] = {}
    for i, one in enumerate(emoji):
        if one["id"] in by_code:
            found[i] = by_code[one["id"]]
            continue
        tried = [plain(n) for n in [one["name"], *one["other_names"]]]
        tried += [name + "1" for name in tried if not name[-1].isdigit()]
        hit = next((by_name[n] for n in tried if n in by_name), None)
        # Two emoji that end at one icon: the first in Unicode's order keeps it.
        if hit is not None and hit not in found.values():
            found[i] = hit
    size = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
    return {i: {**size, **resolve(icons, name)} for i, name in found.items()}


def draw(icon: dict[str, Any]) -> np.ndarray:
    """One icon, centred on white, as uint8 of shape (SIZE, SIZE, 3)."""
    width, height = icon["width"], icon["height"]
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    body = icon["body"].replace("currentColor", "#000000")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {side} {side}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if icon.get("hFlip"):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if icon.get("vFlip"):
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    picture = picture.rotate(-90 * icon.get("rotate", 0))
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def write_sheet(pictures: list[np.ndarray], path: Path) -> None:
    """Tile the pictures row by row into one lossless WebP file."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows, COLUMNS, SIZE, SIZE, 3), 255, dtype=np.uint8)
    sheet.reshape(-1, SIZE, SIZE, 3)[: len(pictures)] = np.stack(pictures)
    flat = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(flat).save(path, lossless=True, quality=100, method=6)


NOTE = """# {title}

Pictures by {author} ({url}), taken as vectors from the npm package `@iconify-json/{package}`,
drawn at {size} by {size} pixels on white and tiled into one sheet. Nothing else was changed.

Licence: {licence}, {terms}
"""
MIT = """
Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software
and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
TERMS = {
    APACHE: "http://www.apache.org/licenses/LICENSE-2.0 (the repository's LICENSE is a copy)",
    CC_BY: "https://creativecommons.org/licenses/by/4.0/",
    CC_BY_SA: "https://creativecommons.org/licenses/by-sa/4.0/ (and so is this sheet)",
    "MIT": "as follows.",
}


def write_licence(style: str, source: Source, folder: Path) -> None:
    """Say beside the sheet whose pictures these are and how they may be used."""
    note = NOTE.format(title=style, size=SIZE, terms=TERMS[source.licence], **vars(source))
    (folder / "LICENSE.md").write_text(note + (MIT if source.licence == "MIT" else ""))


def main() -> None:
    """Fetch, match by code point or name, draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--downloads", type=Path, required=True, help="where packages are kept")
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args()

    packages = {style: f"@iconify-json/{source.package}" for style, source in STYLES.items()}
    folders = fetch([NAMES, *packages.values()], args.downloads)
    tables = []
    for style in ("noto", "fluent-emoji-flat", "twemoji", "openmoji"):
        table = json.loads((folders[packages[style]] / "chars.json").read_text())
        tables.append({code(k): v for k, v in table.items()})
    emoji = read_emoji(folders[NAMES], tables)

    styles = {}
    for style, source in STYLES.items():
        icons = find_icons(folders[packages[style]], emoji)
        with ProcessPoolExecutor() as pool:
            pictures = list(pool.map(draw, icons.values(), chunksize=32))
        folder = (args.out / "share-alike" if source.share_alike else args.out) / style
        write_sheet(pictures, folder / "sheet.webp")
        write_licence(style, source, folder)
        styles[style] = {
            "folder": str(folder.relative_to(args.out)),
            "licence": source.licence,
            "emoji": list(icons),
        }
        print(f"{style}: {len(pictures)} of {len(emoji)} emoji")
    index = {"size": SIZE, "columns": COLUMNS, "emoji": emoji, "styles": styles}
    text = json.dumps(index, ensure_ascii=False)
    # One emoji a line keeps differences readable without a line for every field.
    text = text.replace('}, {"id"', '},\n{"id"').replace('"styles": {', '\n"styles": {')
    (args.out / "index.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
