"""The rows of the matrix: a method is one entry of `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn

import graftune
from support.models import MODELS


@dataclass(frozen=True)
class MethodCase:
    """A method as the matrix tests it.

    Args:
        name: the recipe's name.
        options: config fields, small enough for the test models.
        models: the model cases that the method is defined for.
        prefix: what the names of its tensors begin with; its name and "_" unless given.
        starts_as_base: whether a fresh adapter leaves the model's output as it is.
        merges: whether `merge_and_unload` is defined.
        needs_own_base: whether an adapter fits no other copy of its base model, in another dtype or
            with other values, whatever the user says.
        merge_tolerance: largest difference between merged and unmerged outputs in float32,
            relative to the output's scale.
        from_terms: parts of the names of tensors that learn from a regularizer's term alone: the
            model's output gives them a gradient of zero.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = tuple(MODELS)
    prefix: str = ""
    starts_as_base: bool = True
    merges: bool = True
    needs_own_base: bool = False
    merge_tolerance: float = 1e-5
    from_terms: tuple[str, ...] = ()

    def wrap(self, model: nn.Module, adapter_name: str = "default", **overrides: Any) -> PeftModel:
        """Attach the adapter as a user does: the model's output does not change yet."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            options = {**self.options, **overrides}
            return graftune.wrap(model, self.name, adapter_name=adapter_name, **options)

    def wrap_trained(
        self, model: nn.Module, adapter_name: str = "default", **overrides: Any
    ) -> PeftModel:
        """Attach an adapter with other than its first values, as if it had been trained."""
        return self.wrap(model, adapter_name, init_weights=False, **overrides)


VISION_TRANSFORMERS = (
    "transformers-clip",
    "transformers-siglip",
    "transformers-vit",
    "open_clip-vit",
    "timm-vit",
)

METHODS = {
    case.name: case
    for case in (
        MethodCase(name="flora", options={"r": 3}),
        MethodCase(name="mask_tuning", merge_tolerance=0.0),
        MethodCase(
            name="sara",
            # Outside of a BERT's last hidden state: nothing reaches its pooler.
            options={"fraction": 0.2, "exclude_modules": ["pooler.dense"]},
            needs_own_base=True,
        ),
        MethodCase(
            name="promptsrc",
            options={
                "num_tokens_text": 3,
                "num_tokens_vision": 2,
                "depth_text": 2,
                "depth_vision": 1,
                "init_text": None,
            },
            models=("transformers-clip", "transformers-siglip", "open_clip-vit"),
            prefix="deep_prompt_",
            starts_as_base=False,  # prompts are tokens of their own
            merges=False,
        ),
        MethodCase(
            name="ovor",
            options={"lengths": [4, 6]},
            models=VISION_TRANSFORMERS,
            prefix="one_prompt_",
            starts_as_base=False,  # prompts are keys and values of their own
            merges=False,
        ),
        MethodCase(
            name="l2p",
            options={"pool_size": 4, "length": 2, "chosen": 4},
            models=VISION_TRANSFORMERS,
            starts_as_base=False,
            merges=False,
            from_terms=("l2p_keys",),
        ),
        MethodCase(
            name="dual_prompt",
            options={
                "general_length": 4,
                "general_blocks": [0],
                "expert_length": 6,
                "expert_blocks": [1],
                "tasks": 2,
            },
            models=VISION_TRANSFORMERS,
            starts_as_base=False,
            merges=False,
            from_terms=("dual_prompt_keys",),
        ),
        MethodCase(
            name="coda_prompt",
            options={"pool_size": 4, "length": 4, "prompt_blocks": [0, 1], "tasks": 2},
            models=VISION_TRANSFORMERS,
            starts_as_base=False,
            merges=False,
        ),
    )
}

# (method, model) pairs, for pytest.mark.parametrize.
PAIRS = [(method, model) for method in METHODS.values() for model in method.models]
