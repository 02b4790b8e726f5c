"""Write the embedded data as files, for the recipes beside this script.

    python examples/recipes/make_data.py
    graftune train examples/recipes/clip_flora.yaml

Makes `outputs/data/drawings`, a folder with a subfolder of pictures for each kind of emoji, drawn
in a style that the embedded CLIP has never seen (the licence lies beside them), and
`outputs/data/waybills.jsonl`, prompts with completions for a language model.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from embedded.pictures import (  # noqa: E402
    FAR,
    NEGATIVE,
    folder_of,
    load_style,
    subcategory_text,
)
from embedded.waybills import waybills_task  # noqa: E402

LEAST = 24  # pictures that a kind needs to be written
ROWS = 512


def write_drawings(folder: Path) -> int:
    """Write the pictures of the larger kinds, and return how many there are."""
    style = load_style(FAR + NEGATIVE)
    kinds = defaultdict(list)
    for emoji, image in zip(style.emoji, style.images, strict=True):
        kinds[subcategory_text(emoji.subcategory)].append((emoji.id, image))
    large = {kind: pictures for kind, pictures in kinds.items() if len(pictures) >= LEAST}
    for kind, pictures in large.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, image in pictures:
            Image.fromarray(image).save(folder / kind / f"{name}.png")
    for file in folder_of(FAR).glob("LICEN*"):
        shutil.copy(file, folder / file.name)
    return sum(map(len, large.values()))


def write_waybills(file: Path) -> int:
    """Write prompts with completions as JSON lines, and return how many there are."""
    rows = waybills_task(seed=0, count=ROWS).train
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main(folder: Path) -> None:
    print(f"{write_drawings(folder / 'drawings')} pictures in {folder / 'drawings'}")
    print(f"{write_waybills(folder / 'waybills.jsonl')} rows in {folder / 'waybills.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/data"))
