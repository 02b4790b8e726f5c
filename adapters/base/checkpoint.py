"""What a saved adapter must hold: nothing empty, nothing missing, nothing foreign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.sharded import is_sharded


class AdapterMismatchError(ValueError):
    """An adapter's tensors are not those of the model it is loaded onto."""


_for_training: ContextVar[bool] = ContextVar("graftune_training_checkpoint", default=False)


@contextmanager
def training_checkpoint() -> Iterator[None]:
    """Let adapters be saved with all that training needs to go on from them.

    What is published holds what inference needs and no more; for most methods that is the same.
    graftune's trainer writes its checkpoints in here.

    Example:
        >>> with training_checkpoint():
        ...     model.save_pretrained("checkpoint")
    """
    token = _for_training.set(True)
    try:
        yield
    finally:
        _for_training.reset(token)


def is_training_checkpoint() -> bool:
    """Say whether adapters are being saved for training to go on from."""
    return _for_training.get()


def check_not_empty(tensors: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raise ValueError when an adapter about to be written holds no numbers, or not all of them.

    Sharded training (DeepSpeed ZeRO-3, FSDP) leaves tensors of size zero outside its gathering
    context, or a part of them in each process; a file of those would look like an adapter and be
    none.
    """
    if not tensors:
        raise ValueError(
            f"the adapter {adapter_name!r} has no tensors: nothing was written. Is the adapter "
            "attached to this model?"
        )
    sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
    if sharded:
        raise ValueError(
            f"{len(sharded)} of {len(tensors)} tensors of the adapter {adapter_name!r} are spread "
            f"over processes ({listing(sharded, 3)}): nothing was written. Save with "
            "`trainer.save_model(folder)`, or gather them first: "
            "graftune.integrations.training.sharding.whole_state_dict(model), passed as "
            "`state_dict=`."
        )
    hollow = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if hollow:
        raise ValueError(
            f"{len(hollow)} of {len(tensors)} tensors of the adapter {adapter_name!r} are empty "
            f"({listing(hollow, 3)}): nothing was written. Under DeepSpeed ZeRO-3 or FSDP gather "
            "the parameters first, for example with `accelerator.get_state_dict(model)` passed as "
            "`state_dict=`."
        )


def check_fits(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise AdapterMismatchError unless `given` has exactly the expected tensors and shapes.

    Args:
        expected: shapes of the adapter's tensors on the model at hand, by checkpoint name.
        given: shapes of the tensors in the file.
    """
    if not given:
        raise AdapterMismatchError(
            f"the file holds no tensors of this adapter, but {len(expected)} are expected "
            f"({listing(sorted(expected), 3)}): it is empty or belongs to another method"
        )
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing ({listing(missing, 3)})")
        if extra:
            hint = nearest(extra[0], missing or expected)
            parts.append(f"{len(extra)} the model has no place for ({listing(extra, 3)}){hint}")
        raise AdapterMismatchError(
            f"the adapter does not fit this base model: of {len(expected)} expected tensors "
            + " and ".join(parts)
            + ". Load it onto the architecture it was trained on."
        )
    wrong = [name for name in sorted(expected) if tuple(expected[name]) != tuple(given[name])]
    if wrong:
        name = wrong[0]
        raise AdapterMismatchError(
            f"the adapter does not fit this base model: {len(wrong)} tensors have another shape, "
            f"for example {name!r} with {tuple(given[name])} in the file and "
            f"{tuple(expected[name])} on the model. Load it onto the architecture it was trained "
            "on."
        )
