"""Texts and pictures for the small CLIP models: a tokenizer of whole words, and plain colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from support.models import MODELS

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "light grey": (0.8, 0.8, 0.8),
}
WORDS = ["a", "of", "the", "photo", "drawing", ".", "red", "green", "blue", "light", "grey"]
END = 63  # the highest id of the small models' vocabulary, where CLIP's text tower pools


def transformers_tokenizer() -> Any:
    """A tokenizer of transformers whose texts end with id 63 and are padded with 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<start>": 0, "<pad>": 1, "<unknown>": 2, "<end>": END}
    vocabulary |= {word: index for index, word in enumerate(WORDS, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unknown>", model_max_length=16
    )


class OpenClipTokenizer:
    """A tokenizer as open_clip's are: texts to ids of a fixed length, zeros at the end."""

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        ids = torch.zeros(len(texts), context_length or 16, dtype=torch.long)
        for row, text in enumerate(transformers_tokenizer()(list(texts))["input_ids"]):
            ids[row, : len(text)] = torch.tensor(text)
        return ids


def clip(name: str = "transformers-clip") -> tuple[nn.Module, Any]:
    """A small model with two towers and its tokenizer."""
    tokenizer = OpenClipTokenizer() if name.startswith("open_clip") else transformers_tokenizer()
    return MODELS[name].build(), tokenizer


def colours(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` noisy pictures of plain colours with labels, 32 × 32, class after class."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        label = index % len(COLOURS)
        colour = torch.tensor(list(COLOURS.values())[label])[:, None, None]
        noise = 0.3 * torch.randn(3, 32, 32, generator=generator)
        rows.append({"pixel_values": colour + noise, "labels": label, "file": f"{index}.png"})
    return rows
