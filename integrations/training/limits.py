"""What regularizers cannot do under some ways to train, said before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftune.adapters.base.messages import listing
from graftune.adapters.regularizers import Regularizer
from graftune.adapters.regularizers.session import APART
from graftune.integrations.libraries.recomputing import is_reentrant


def check_limits(regularizers: Sequence[Regularizer], trainer: Any) -> None:
    """Raise what stands between regularizers and a trainer's way to train.

    Raises:
        ValueError: a regularizer needs gradients that DeepSpeed, FSDP or reentrant checkpointing do
            not hand out, or parameters that FSDP 1 does not show.
    """
    changing = [r.name for r in regularizers if changes_gradients(r)]
    separate = [r.name for r in regularizers if r.needs & APART]
    if trainer.is_deepspeed_enabled and (changing or separate):
        raise ValueError(
            f"{listing(sorted({*changing, *separate}))} need gradients, which DeepSpeed keeps in "
            "its engine; train with DDP or FSDP 2, or without them"
        )
    if trainer.is_fsdp_enabled and regularizers and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            f"{listing(r.name for r in regularizers)} need the parameters, which FSDP 1 flattens; "
            "set fsdp_version: 2 (fsdp_config={'version': 2})"
        )
    if trainer.is_fsdp_enabled and separate:
        raise ValueError(
            f"{listing(separate)} need gradients of terms by themselves, which FSDP does not "
            "hand out; train with DDP or without them"
        )
    several = regularizers and trainer.args.world_size > 1
    if is_reentrant(trainer.args) and (separate or several):
        names = separate or [r.name for r in regularizers]
        why = "does not give gradients of terms by themselves" if separate else "breaks under DDP"
        raise ValueError(
            f"{listing(names)}: reentrant checkpointing {why}; "
            "set activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def changes_gradients(regularizer: Regularizer) -> bool:
    """Say whether a regularizer has a gradient transform."""
    return type(regularizer).transform_gradients is not Regularizer.transform_gradients
