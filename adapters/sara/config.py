"""The config of SaRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftune.adapters.base.config import WeightConfig
from graftune.adapters.base.registration import add_peft_type

SARA = add_peft_type("SARA")

THRESHOLD = 2e-3  # of the paper, for Stable Diffusion
SELECTIONS = ("smallest", "largest", "random")


@dataclass
class SaraConfig(WeightConfig):
    """Config of SaRA, which trains the weights of smallest magnitude where they are.

    Every entry with |w| < t becomes trainable, biases included, starting at its own value; all
    others stay as they are (High-efficient diffusion model fine-tuning with progressive sparse
    low-rank adaptation, arXiv 2409.06633, section 4.1). How many there are is said by one of
    `threshold`, `fraction` and `num_parameters`, counted over all targets together.

    Args:
        threshold: t > 0: as many entries as have |w| < t. 2e-3 unless one of the three is given.
        fraction: in (0, 1): this share of all targeted entries.
        num_parameters: at least 1: so many entries; fewer where magnitudes tie at the boundary.
        select: which entries: "smallest", the method; "largest" or "random", for comparison, as
            many as the three fields above say.
        seed: of the random selection.
        store_indices: whether the saved adapter says where its entries are (in the smaller of a
            bitmask and 32-bit indices). Without, they are found again in the base model's weights,
            which then have to be those of training in the same dtype.
        target_modules: names or a regular expression of the modules whose own parameters are
            trained. None takes every module, unless `target_parameters` are given.
        target_parameters: names of parameters, for example `attn.in_proj_weight`.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; with a list of target modules.
        layers_pattern: name of the list of layers that the indices refer to.
        init_weights: True starts at the base model's own values; False elsewhere, for tests.
        modules_to_save: modules to train in full and to save with the adapter.
        cutoff: the magnitude that the selection comes down to (its share of entries where
            select="random"); entered on attaching. Not meant to be set by hand.
        base_dtype: the dtype of the weights that were selected from; entered on attaching.

    Raises:
        TypeError: `target_parameters` is a string.
        ValueError: a field is out of range, or more than one says how many entries to train.

    Example:
        >>> SaraConfig(fraction=0.1, target_modules=["to_q", "to_v"]).threshold is None
        True
    """

    # Targets that are left open stay open in `graftune.wrap`: they mean every module but the head.
    none_targets_all: ClassVar[bool] = True

    about: ClassVar[str] = (
        "SaRA trains the weights of smallest magnitude in place and leaves all others as they are; "
        "what is saved is the values of these entries "
        "([SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank "
        "Adaptation](https://arxiv.org/abs/2409.06633))."
    )

    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Train as many entries as have a magnitude below this; 0.002 if neither this "
            "nor `fraction` nor `num_parameters` is given."
        },
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Train this share of all targeted entries, in (0, 1)."}
    )
    num_parameters: int | None = field(
        default=None, metadata={"help": "Train so many of all targeted entries."}
    )
    select: str = field(
        default="smallest",
        metadata={"help": "Which entries: 'smallest', 'largest' or 'random'."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random selection."})
    store_indices: bool = field(
        default=False,
        metadata={
            "help": "Save where the entries are, too: the adapter then fits other copies of its "
            "base model."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules whose own parameters are trained, a regular expression "
            "that matches their full names, or 'all-linear'. None takes every module."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters to train, for example 'attn.in_proj_weight'."},
    )
    cutoff: float | None = field(
        default=None,
        metadata={
            "help": "The magnitude that selection came down to; set when it is attached.",
            "internal": True,
        },
    )
    base_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The dtype of the weights selected from; set when it is attached.",
            "internal": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SARA
        self._check_amount()
        if self.select not in SELECTIONS:
            raise ValueError(f"`select` is one of {SELECTIONS}, got {self.select!r}")

    def _check_amount(self) -> None:
        amounts = {name: getattr(self, name) for name in ("threshold", "fraction")}
        amounts["num_parameters"] = self.num_parameters
        given = {name: value for name, value in amounts.items() if value is not None}
        if not given:
            given["threshold"] = self.threshold = THRESHOLD
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'{n}={v!r}' for n, v in given.items())} both say how many entries "
                "to train: give one of `threshold`, `fraction` and `num_parameters`"
            )
        ((name, value),) = given.items()
        if not _is_in_range(name, value):
            ranges = {
                "threshold": "a finite number above 0",
                "fraction": "a number between 0 and 1, exclusive",
                "num_parameters": "a whole number of at least 1",
            }
            raise ValueError(f"`{name}` must be {ranges[name]}, got {value!r}")

    @property
    def takes_everything(self) -> bool:
        """Whether no module or parameter is named: every one is a target."""
        return self.target_modules is None and not self.target_parameters


def _is_in_range(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if name == "num_parameters":
        return isinstance(value, int) and value >= 1
    return 0 < value < (1 if name == "fraction" else float("inf"))
