"""Next-token prediction by a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from graftune.adapters.base.precision import at_least_float32
from graftune.integrations.objectives import taps
from graftune.integrations.objectives.labels import IGNORED, check_labels, cross_entropy
from graftune.integrations.objectives.unwrap import base_of, tensor_of

_VOCABULARY = "tokenize with the model's own tokenizer, or resize its embeddings"


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts: out[:, t] = labels[:, t + 1], -100 at the end.

    Args:
        labels: (B, L).
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class CausalLM(nn.Module):
    """Predict each token from those before it.

    loss = mean over b and t with labels[b, t + 1] ≠ −100 of
    −log softmax(logits[b, t])[labels[b, t + 1]], computed in float32 (the loss of transformers'
    causal language models). It owns no weights. Tokens that PEFT's prompt methods put in front are
    cut from what it returns. "features" has "hidden", what enters the output embedding: (B, L, H).

    Args:
        compared: the positions at which regularizers compare logits with the frozen model's (the
            returned "mask"): "labelled", those that the loss is of; or "unlabelled", the others
            that are not padding, so that prompts, and texts without any label, keep the model
            where it was and labels alone move it. Such a term is divided as the loss is: by the
            number of labelled tokens.

    Raises:
        ValueError: another `compared`; when called, labels out of range or of another shape than
            the tokens, or features of a model without an output embedding.
        TypeError: when called, the model returns no logits.

    Example:
        >>> batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(examples)
        >>> CausalLM()(model, **batch)["loss"].backward()
    """

    def __init__(self, compared: Literal["labelled", "unlabelled"] = "labelled") -> None:
        super().__init__()
        if compared not in ("labelled", "unlabelled"):
            raise ValueError(f"`compared` is 'labelled' or 'unlabelled', got {compared!r}")
        self.compared = compared

    def forward(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        features: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Return logits (B, L, V), with labels the loss and the mask (B, L), features if asked for.

        Args:
            model: a causal language model; as it comes from DDP, FSDP, torch.compile or PEFT.
            input_ids: tokens, (B, L).
            labels: (B, L), the tokens again, with −100 for those that are not to be predicted.
            num_items_in_batch: by what the summed loss is divided; default: the number of
                predicted tokens in this batch.
            features: return what enters the output embedding as well.
            **inputs: what else the model takes, such as attention_mask (B, L).
        """
        length = input_ids.shape[1]
        tap = taps.tap_input(self._head(model, features))
        with tap.switched(features):
            output = model(input_ids=input_ids, **inputs)
        logits = tensor_of(output, "logits", model)[:, -length:]
        result: dict[str, Any] = {"logits": logits}
        if features:
            result["features"] = {"hidden": tap.take()[:, -length:]}
        if labels is not None:
            self._check_labels(labels, input_ids, logits.shape[-1])
            result |= cross_entropy(logits, next_tokens(labels), num_items_in_batch)
            if self.compared == "unlabelled":
                tokens = inputs.get("attention_mask", torch.ones_like(input_ids)).bool()
                result["mask"] = tokens & ~result["mask"]
        return result

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of tokens that are predicted in a batch."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def preprocess_logits_for_metrics(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return what `metrics` needs of a batch, small enough to keep for a whole data set.

        Args:
            logits: (B, L, V).
            labels: (B, L); −100 is left out.

        Returns:
            For each sequence the summed loss, the number of tokens that were predicted right and
            the number of tokens predicted: (B, 3), float32 or better.
        """
        targets = next_tokens(labels)  # (B, L)
        # (B, V, L): cross entropy wants the classes on axis 1.
        losses = F.cross_entropy(
            at_least_float32(logits).transpose(1, 2),
            targets,
            ignore_index=IGNORED,
            reduction="none",
        )
        right = logits.argmax(-1) == targets
        return torch.stack([losses.sum(1), right.sum(1), (targets != IGNORED).sum(1)], dim=1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return mean loss and accuracy over all predicted tokens, and the perplexity exp(loss).

        Args:
            predictions: what `preprocess_logits_for_metrics` returned, for N sequences: (N, 3).
            labels: not used.

        Raises:
            ValueError: the predictions are something else, such as logits.
        """
        if predictions.ndim != 2 or predictions.shape[1] != 3:
            raise ValueError(
                f"predictions have the shape {predictions.shape} instead of (sequences, 3); give "
                "the trainer this objective's preprocess_logits_for_metrics"
            )
        total, right, count = predictions.astype(np.float64).sum(0)
        if not count:
            return {"loss": np.nan, "perplexity": np.nan, "token_accuracy": np.nan}
        loss = total / count
        return {
            "loss": float(loss),
            "perplexity": float(np.exp(loss)),
            "token_accuracy": float(right / count),
        }

    def _head(self, model: nn.Module, needed: bool) -> nn.Module | None:
        base = base_of(model)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if head is None and needed:
            raise ValueError(
                f"{type(base).__name__} has no output embedding to take features from; features "
                "need a causal language model of transformers"
            )
        return head

    def _check_labels(self, labels: torch.Tensor, input_ids: torch.Tensor, count: int) -> None:
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; "
                "give one label a token (the tokens themselves: they are shifted here)"
            )
        check_labels(labels, count, f"the model has {count} tokens", _VOCABULARY)
