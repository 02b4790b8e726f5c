"""What the configs of all of graftune's methods share."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig


@dataclass
class GraftConfig(PeftConfig):
    """The fields that every method of graftune has beside its own.

    Args:
        base_digest: the digest of the base model that the adapter belongs to
            (`graftune.adapters.digest.base_digest`); written when an adapter is attached, checked
            when it is loaded. Not meant to be set by hand.
    """

    base_digest: str | None = field(
        default=None,
        metadata={
            "help": "Digest of the base model the adapter was trained on; set when it is attached."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A digest that comes with the constructor was read from a file and waits to be compared;
        # one that was entered on attaching follows the model. Neither of these is a field: they
        # are not saved.
        self.base_digest_is_fresh = False
        self.base_check = "warn"
