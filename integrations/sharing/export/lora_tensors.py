"""Low-rank forms as the tensors of PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from graftune.integrations.sharing.export.changes import Change
from graftune.integrations.sharing.export.lora_slots import NoSlotError, Slot
from graftune.integrations.sharing.export.low_rank import LowRank, best, fold, fold_stack, reduced


def exact_form(change: Change, stacked: bool = False) -> LowRank | None:
    """Return the change as a matrix of low rank, or None where the adapter has no such form.

    Args:
        change: with a base tensor of shape (d_0, d_1, ...).
        stacked: three axes are a stack of matrices.

    Returns:
        (d_0, r) and (r, d_1 d_2 ⋯), or (d_0, d_1, r) and (d_0, r, d_2) if stacked.
    """
    if change.tucker is not None:
        return fold_stack(*change.tucker) if stacked else fold(*change.tucker)
    return None if stacked else change.low_rank


def approximate(change: Change, slot: Slot, rank: int | None) -> tuple[LowRank, float, float]:
    """Return the change as a matrix of at most the given rank, with ‖error‖² and ‖ΔW‖².

    Raises:
        LookupError: without a rank, and the adapter is of no low rank.
        NoSlotError: the rank is too small for the groups of a convolution.
    """
    exact = exact_form(change, slot.stacked) if slot.groups == 1 else None
    if exact is not None:
        form, squared_error = (exact, 0.0) if rank is None else reduced(exact, rank)
        return form, squared_error, exact.squared_norm()
    if rank is None:
        raise LookupError(change.name)
    delta = change.delta()
    squared_norm = float(delta.square().sum())
    if slot.stacked:
        return *best(delta, rank), squared_norm
    matrix = delta.flatten(1)
    if slot.groups > 1:
        # Every group is a matrix of its own, and PEFT shares the rank out among them.
        matrix = matrix.unflatten(0, (slot.groups, -1))  # (g, d_out / g, d_in / g · k)
        rank = rank // slot.groups
        if rank == 0:
            raise NoSlotError(
                f"PEFT's LoRA of a convolution with {slot.groups} groups needs a rank of at least "
                f"{slot.groups}"
            )
    return *best(matrix, rank), squared_norm


def layer_tensors(change: Change, slot: Slot, form: LowRank) -> dict[str, Tensor]:
    """Return the tensors of one LoRA layer by their names in it.

    Args:
        change: the base tensor's.
        slot: of any kind but "attention".
        form: the change as a matrix.
    """
    if slot.is_in_out:
        form = form.mT
    a, b = form.down, form.up  # (r, d_in), (d_out, r)
    if slot.kind == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if slot.kind == "conv":
        return _of_convolution(change, slot.groups, form)
    if slot.stacked:
        a = a.flatten(0, 1)  # (n, r, d_in) -> (n · r, d_in)
        b = b.permute(1, 2, 0).flatten(1)  # (n, d_out, r) -> (d_out, r · n)
    return {"lora_A.weight": a, "lora_B.weight": b}


def _of_convolution(change: Change, groups: int, form: LowRank) -> dict[str, Tensor]:
    out, _, *kernel = change.base.shape
    pointwise = (1,) * len(kernel)
    if groups == 1:
        a, b = form.down, form.up
        return {
            "lora_A.weight": a.reshape(form.rank, -1, *kernel),
            "lora_B.weight": b.reshape(out, form.rank, *pointwise),
        }
    # Here lora_A reads all channels for every group: those of other groups get zeros.
    blocks = [part.reshape(form.rank, -1, *kernel) for part in form.down]
    width = blocks[0].shape[1]
    a = form.down.new_zeros(groups * form.rank, groups * width, *kernel)
    for i, block in enumerate(blocks):
        a[i * form.rank : (i + 1) * form.rank, i * width : (i + 1) * width] = block
    return {
        "lora_A.weight": a,
        "lora_B.weight": form.up.reshape(out, form.rank, *pointwise),
    }


def attention_tensors(
    attention: nn.MultiheadAttention, parts: Mapping[str, LowRank]
) -> tuple[int, dict[str, Tensor]]:
    """Return rank and tensors of LoRA around an `nn.MultiheadAttention`.

    Such a LoRA has one rank for the packed input projection and the output projection: the
    smaller form gets zeros up to the other's rank, and what is not adapted is zeros altogether.

    Args:
        attention: the base module.
        parts: forms of "in_proj_weight" and "weight", that of the output projection.
    """
    rank = max(form.rank for form in parts.values())
    some = next(iter(parts.values())).up
    width = attention.embed_dim
    tensors = {}
    for part, prefix, rows in (
        ("in_proj_weight", "", 3 * width),
        ("weight", "base_layer.out_proj.", width),
    ):
        form = parts.get(part) or LowRank(some.new_zeros(rows, 1), some.new_zeros(1, width))
        form = form.padded(rank)
        tensors[f"{prefix}lora_A.weight"] = form.down
        tensors[f"{prefix}lora_B.weight"] = form.up
    return rank, tensors
