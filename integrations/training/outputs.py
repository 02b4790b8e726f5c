"""The outputs behind a trainer's loss, as regularizers see them, from its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from graftune.integrations.training.transformers_private import FUSED_LM_HEAD


class Seen:
    """What the last forward pass with gradients returned."""

    def __init__(self) -> None:
        self.outputs: Any = None
        self._labels: Tensor | None = None  # of a call whose output embedding was to be fused

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a call of TRL's return logits, which it would fuse into the loss."""
        self._labels = None
        if not (torch.is_grad_enabled() and kwargs.get(FUSED_LM_HEAD)):
            return None
        self._labels = kwargs["labels"]
        left_out = (FUSED_LM_HEAD, "labels", "num_items_in_batch")
        return args, {name: value for name, value in kwargs.items() if name not in left_out}

    def after(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        """Keep the outputs; to TRL's call return what it expects."""
        if torch.is_grad_enabled():
            self.outputs = outputs
        return None if self._labels is None else per_token(outputs, self._labels)


@contextmanager
def seen_outputs(model: nn.Module) -> Iterator[Seen]:
    """See what a model returns to whoever calls it here, with the gradients of that call.

    Trainers may not hand out the outputs that their loss came from: TRL's compute logits a second
    time, without gradients.

    Args:
        model: as the trainer calls it, in all its wrappers.

    Example:
        >>> with seen_outputs(model) as seen:
        ...     loss = trainer.compute_loss(model, inputs)
        >>> seen.outputs["logits"].requires_grad
        True
    """
    seen = Seen()
    hooks = [
        model.register_forward_pre_hook(seen.before, with_kwargs=True),
        model.register_forward_hook(seen.after),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def per_token(outputs: Any, labels: Tensor) -> SimpleNamespace:
    """Return what TRL's fused output embedding returns, from the logits.

    Args:
        outputs: with "logits" (B, L, V).
        labels: (B, L); −100 is left out.

    Returns:
        For each label from the second on, (B, L − 1), zero where it is −100: log_probs with
        gradients, entropy, is_top1; and label_mask, and the aux_loss of the outputs.

    Raises:
        ValueError: there are no logits.
    """
    if outputs.get("logits") is None:
        raise ValueError(
            "regularizers need the model's logits, and it returned none; set "
            "use_liger_kernel=False, or switch off whatever else replaces the model's loss"
        )
    logits = outputs["logits"][:, -labels.shape[1] : -1].float()  # (B, L - 1, V)
    labels = labels[:, 1:].to(logits.device)
    mask = labels != -100
    log_p = logits.log_softmax(-1)
    of_labels = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
        top = logits.argmax(-1) == labels
    return SimpleNamespace(
        log_probs=of_labels.masked_fill(~mask, 0),
        entropy=entropy.masked_fill(~mask, 0),
        is_top1=top & mask,
        label_mask=mask,
        aux_loss=outputs.get("aux_loss"),
    )


def named(outputs: Any, inputs: Mapping[str, Any], shifted: bool) -> dict[str, Any]:
    """Return what an objective would, of what a transformers model returned.

    Args:
        outputs: a mapping of tensors, or a tuple that ends with the logits.
        inputs: the batch.
        shifted: whether each label belongs to the position before it.
    """
    result = dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs[-1]}
    if result.get("hidden_states"):
        result["features"] = {"hidden": result["hidden_states"][-1]}
    labels, logits = inputs.get("labels"), result.get("logits")
    if labels is None or logits is None or labels.ndim > logits.ndim - 1:
        return result
    if logits.ndim == 3:
        # Without the positions of PEFT's virtual tokens, which the frozen model does not have.
        result["logits"] = logits[:, -labels.shape[1] :]
        for name, feature in result.get("features", {}).items():
            result["features"][name] = feature[:, -labels.shape[1] :]
    if labels.shape == result["logits"].shape[:-1]:
        result["mask"] = _mask(labels, shifted)
    return result


def _mask(labels: Tensor, shifted: bool) -> Tensor:
    """The positions whose logits are trained."""
    counts = labels != -100
    if not shifted:
        return counts
    return torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
