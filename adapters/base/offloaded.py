"""Tensors of an adapter that are not where they are computed with."""

from __future__ import annotations

from torch import Tensor


def check_in_memory(tensor: Tensor, x: Tensor | None = None) -> None:
    """Raise where an adapter's tensor has no values while the input has.

    Offloading by single modules brings in the weights of modules that are called; an adapter's
    tensors stand in containers that never are.

    Args:
        tensor: of the adapter.
        x: the layer's input, which may be without values as well; None: there has to be some.

    Raises:
        RuntimeError: the tensor is on the meta device.
    """
    if tensor.is_meta and not (x is not None and x.is_meta):
        raise RuntimeError(
            "the adapter's tensors are not in memory: weights are offloaded one by one, as by "
            "`pipeline.enable_sequential_cpu_offload()` or `accelerate.cpu_offload(model)`, which "
            "brings back only those of modules that are called. Offload whole models, by "
            "`pipeline.enable_model_cpu_offload()`, or groups, by "
            "`model.enable_group_offload(...)`; or merge the adapter first"
        )
