"""What the mixins are mixed into, as type checkers see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as SomeTrainer
else:
    SomeTrainer = object
