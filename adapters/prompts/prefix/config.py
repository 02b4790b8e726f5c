"""What the configs of prefixes share: which attentions they are in."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from graftune.adapters.base.config import GraftConfig

# Keys and values together; an image of 224 pixels has 196 patches.
MOST = 512


@dataclass
class PrefixConfig(GraftConfig):
    """The fields of configs whose prompts are in the attentions of a vision transformer.

    `graftune.wrap` finds the modules; with `peft.get_peft_model` name them here.

    Args:
        blocks: name of the list of blocks.
        attention: name of the attention within a block.
        projections: names within the attention of the two modules that compute keys and values, or
            of the one that computes queries, keys and values; empty for `nn.MultiheadAttention`.
        init_weights: True starts as published; False far from the base model, for tests.
        modules_to_save: modules to train in full and to save with the adapter, such as the
            classifier.
    """

    blocks: str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    attention: str | None = field(
        default=None, metadata={"help": "Name of the attention within a block."}
    )
    projections: list[str] | None = field(
        default=None,
        metadata={"help": "What computes keys and values; empty for nn.MultiheadAttention."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False starts far from the base model, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and to save with the adapter."}
    )

    @property
    @abstractmethod
    def prompted(self) -> list[int]:
        """The numbers of the blocks that have prompts."""

    @property
    def target_modules(self) -> str | None:
        """The attentions of these blocks, as the regular expression that PEFT matches."""
        if self.blocks is None or self.attention is None:
            return None
        numbers = "|".join(map(str, self.prompted))
        return rf"{re.escape(self.blocks)}\.({numbers})\.{re.escape(self.attention)}"


def check_length(name: str, length: int) -> None:
    """Raise ValueError where a prefix cannot have a length: keys and values together."""
    is_whole = isinstance(length, int) and not isinstance(length, bool)
    if not is_whole or not 0 <= length <= MOST or length % 2:
        raise ValueError(
            f"`{name}` must be an even number from 0 to {MOST}, half of it keys and half of it "
            f"values; got {length!r}"
        )


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError where a value is not a whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")


def check_blocks(name: str, blocks: Sequence[int]) -> None:
    """Raise ValueError where numbers of blocks are not distinct and at least 0."""
    for number in blocks:
        check_count(name, number, least=0)
    if not len(blocks) or len(set(blocks)) < len(blocks):
        raise ValueError(f"`{name}` must be one or more different blocks, got {list(blocks)}")
