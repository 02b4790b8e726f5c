"""The config of OnePrompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from graftune.adapters.base.registration import add_peft_type
from graftune.adapters.prompts.prefix.config import PrefixConfig, check_length

ONE_PROMPT = add_peft_type("ONE_PROMPT")


@dataclass
class OnePromptConfig(PrefixConfig):
    """Config of OnePrompt: one prefix prompt a block, the same for all images and tasks.

    The first half of a prompt's rows are keys, the second half values; they stand in front of those
    of the block's attention as they are, without projection, over all heads (OVOR, arXiv
    2402.04129, section 3.1). There is no pool and no query: a forward pass costs what the base
    model's does.

    Args:
        lengths: keys and values together of the prompts in block 0, 1, ...: even, 0 for none, at
            most 512. The paper's are 10 in two blocks and 40 in three: 107,520 numbers in a ViT-B.
        blocks, attention, projections: names of modules, as `PrefixConfig` says.
        init_weights: True draws from U(0, 1), as the authors' code does; False from N(0, 1), for
            tests.
        modules_to_save: modules to train in full and to save with the adapter, such as the
            classifier.

    Raises:
        ValueError: a length is odd or out of range, or there are no prompts at all.

    Example:
        >>> OnePromptConfig(lengths=[8, 8]).prompted
        [0, 1]
    """

    about: ClassVar[str] = (
        "OnePrompt is one short trained prefix of keys and values in each of the first blocks of a "
        "vision transformer, whose own weights stay as they are "
        "([OVOR](https://arxiv.org/abs/2402.04129))."
    )

    lengths: list[int] = field(
        default_factory=lambda: [10, 10, 40, 40, 40],
        metadata={"help": "Keys and values together of the prompt in each block; even."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ONE_PROMPT
        self.lengths = list(self.lengths)
        for length in self.lengths:
            check_length("lengths", length)
        if not self.prompted:
            raise ValueError(f"there are no prompts in any block, got lengths={self.lengths}")

    @property
    def prompted(self) -> list[int]:
        """The numbers of the blocks that have prompts."""
        return [number for number, length in enumerate(self.lengths) if length]
