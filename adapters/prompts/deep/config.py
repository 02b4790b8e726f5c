"""The config of deep prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from graftune.adapters.base.config import GraftConfig
from graftune.adapters.base.registration import add_peft_type

DEEP_PROMPT = add_peft_type("DEEP_PROMPT")

# The modules that a tower is reached by: found by an integration, or named by hand.
TEXT_PLACES = ("text_embedding", "text_blocks")
VISION_PLACES = ("vision_entry", "vision_blocks")


@dataclass
class DeepPromptConfig(GraftConfig):
    """Config of deep prompts: trained tokens in the blocks of a text and a vision tower.

    Vision: n tokens are appended to the sequence that enters `vision_entry` and, in each block from
    the second to the `depth_vision`-th, replaced by tokens of its own; behind the last block they
    are taken out again. Text: the tokens from `text_start` on are replaced in the output of
    `text_embedding`, before position embeddings are added, and again in the input of each block
    from the second to the `depth_text`-th (independent vision-language prompting of Self-regulating
    Prompts, arXiv 2307.06948, section 3.1).

    `graftune.wrap(clip, DeepPromptConfig(...))` and `graftune.wrap(clip, "promptsrc")` find the
    modules and the words' ids; with `peft.get_peft_model` name them here.

    Args:
        num_tokens_text: prompts in each text block, at least 0; 0 leaves the tower alone.
        num_tokens_vision: the same for the vision tower.
        depth_text: in how many blocks there are prompts, at least 0; 1 is shallow.
        depth_vision: the same for the vision tower.
        init_text: words whose embeddings the first block's text prompts start as, at least as many
            tokens as there are prompts, or None for random ones; read by `graftune.wrap`.
        init_token_ids: the ids of as many tokens as there are prompts.
        text_embedding, text_blocks: names of the token embedding and the list of text blocks.
        text_start: position of the first prompt: 1 after a start of text, 0 where there is none.
        vision_entry, vision_blocks: name of the module whose input prompts are appended to (the
            layer norm before the blocks, or the first block), and of the list of vision blocks.
        init_weights: True draws from N(0, 0.02²) what does not start as words; False from N(0, 1),
            for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        ValueError: a field is out of range or two contradict each other.

    Example:
        >>> DeepPromptConfig(num_tokens_text=0, depth_vision=1).depth_vision
        1
    """

    about: ClassVar[str] = (
        "Deep prompts are trained tokens in the first blocks of a CLIP's text and vision towers, "
        "whose own weights stay as they are "
        "([Self-regulating Prompts](https://arxiv.org/abs/2307.06948))."
    )

    num_tokens_text: int = field(default=4, metadata={"help": "Prompts in each text block."})
    num_tokens_vision: int = field(default=4, metadata={"help": "Prompts in each vision block."})
    depth_text: int = field(default=9, metadata={"help": "Text blocks with prompts."})
    depth_vision: int = field(default=9, metadata={"help": "Vision blocks with prompts."})
    init_text: str | None = field(
        default="a photo of a",
        metadata={"help": "Words that the first text prompts start as; None for random ones."},
    )
    init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "The ids of these words; filled in by graftune.wrap."}
    )
    text_embedding: str | None = field(
        default=None, metadata={"help": "Name of the text tower's token embedding."}
    )
    text_blocks: str | None = field(
        default=None, metadata={"help": "Name of the list of the text tower's blocks."}
    )
    text_start: int = field(
        default=1, metadata={"help": "Position of the first text prompt: 1 after a start of text."}
    )
    vision_entry: str | None = field(
        default=None, metadata={"help": "Name of the module whose input prompts are appended to."}
    )
    vision_blocks: str | None = field(
        default=None, metadata={"help": "Name of the list of the vision tower's blocks."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False starts far from the base model, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and to save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DEEP_PROMPT
        for name in ("num_tokens_text", "num_tokens_vision", "depth_text", "depth_vision"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {value!r}")
        if self.text_start not in (0, 1):
            raise ValueError(f"`text_start` is 0 or 1, got {self.text_start!r}")
        if not (self.has_text or self.has_vision):
            raise ValueError(
                "there are no prompts in either tower: give num_tokens_text and depth_text, or "
                "num_tokens_vision and depth_vision, of at least 1"
            )
        ids = self.init_token_ids
        if ids is not None and self.has_text and len(ids) != self.num_tokens_text:
            raise ValueError(
                f"`init_token_ids` has {len(ids)} ids for num_tokens_text={self.num_tokens_text} "
                "prompts; give one for each"
            )

    @property
    def has_text(self) -> bool:
        """Whether the text tower gets prompts."""
        return self.num_tokens_text > 0 and self.depth_text > 0

    @property
    def has_vision(self) -> bool:
        """Whether the vision tower gets prompts."""
        return self.num_tokens_vision > 0 and self.depth_vision > 0

    @property
    def target_modules(self) -> str | None:
        """The modules that hold the blocks' lists, as the regular expression PEFT matches."""
        lists = [self.text_blocks if self.has_text else None]
        lists.append(self.vision_blocks if self.has_vision else None)
        parents = [re.escape(name.rpartition(".")[0]) for name in lists if name]
        return "|".join(parents) or None
