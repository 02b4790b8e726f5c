"""Prune CLIP's byte-pair encoding to the merges that the captions use, and write the processor.

    python examples/pretraining/build_tokenizer.py

Every word of a caption is segmented as by CLIP's own tokenizer; other words fall into smaller
pieces, down to bytes. The merges are those that `open_clip_torch` ships.
"""

from __future__ import annotations

import argparse
import gzip
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import regex
from captions import every_text
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "clip"
Pair = tuple[str, str]


def read_merges() -> list[Pair]:
    """CLIP's merges, most frequent first."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install open_clip_torch: its wheel holds CLIP's merges")
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    # As in CLIP: a header line, then as many merges as fit into 49,152 pieces.
    return [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # type: ignore[misc]


def byte_table() -> dict[int, str]:
    """`byte -> printable stand-in`, in CLIP's order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    symbols = [*map(chr, kept), *(chr(256 + n) for n in range(len(others)))]
    return dict(zip([*kept, *others], symbols, strict=True))


def merges_of(word: str, rank: dict[Pair, int]) -> set[Pair]:
    """The merges applied while a word is segmented."""
    table = byte_table()
    pieces = [table[b] for b in word.encode()]
    pieces[-1] += "</w>"
    used: set[Pair] = set()
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        used.add(best)
        merged, i = [], 0
        while i < len(pieces):
            if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                merged.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return used


def build(folder: Path) -> CLIPProcessor:
    """Write tokenizer and image processor; CLIP's special tokens keep the two highest ids."""
    merges = read_merges()
    rank = {pair: i for i, pair in enumerate(merges)}
    words = {word for text in every_text() for word in WORDS.findall(text.lower())}
    used = set().union(*(merges_of(word, rank) for word in words))
    kept = [pair for pair in merges if pair in used]
    symbols = list(byte_table().values())
    pieces = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in kept)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError("two merges end in the same piece")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=32)
    size = {"height": 48, "width": 48}
    half = [0.5, 0.5, 0.5]
    # No crop: a square picture is seen whole.
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half
    )
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def main() -> None:
    """Build, and show one segmented caption."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    processor = build(parser.parse_args().out)
    tokenizer = processor.tokenizer
    print(len(tokenizer), "pieces;", tokenizer.tokenize("a picture of a grinning face"))


if __name__ == "__main__":
    main()
