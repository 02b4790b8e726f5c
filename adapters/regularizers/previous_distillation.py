"""Distillation from the model as it was after the previous task, kept as a second adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from graftune.adapters.base.frozen import as_adapter
from graftune.adapters.regularizers.base import Need, State, Step
from graftune.adapters.regularizers.frozen_distillation import FrozenDistillation


@dataclass
class PreviousDistillation(FrozenDistillation):
    """Keep what the model computes near what it computed before the current task.

    The terms of `FrozenDistillation` with the previous task's model in the place of the base model:
    λ · T² · KL of the logits of the classes so far (Learning without Forgetting, arXiv 1606.09282),
    or λ · the squared distance of the features. `keep` puts the adapter, and the classifier in
    `modules_to_save`, as they are into a second PEFT adapter of the same model; before the first
    `keep` the term is not there.

    Args:
        weight: λ ≥ 0.
        of: "logits" (prediction distillation), "outputs", or "features" (feature distillation).
        temperature: T > 0, for "logits".
        adapter: the name of the second adapter.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> distillation = PreviousDistillation(of="features")
        >>> distillation.keep(model)  # after a task, before the next one
    """

    name: ClassVar[str] = "previous_distillation"
    adapter: str = field(
        default="previous", metadata={"help": "The name of the adapter that holds what was."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._classes: int | None = None  # outputs that there were, where that is known

    @property
    def needs(self) -> frozenset[Need]:
        """The features where they are compared; the previous model is run by itself."""
        return frozenset({Need.FEATURES} if self.of == "features" else set())

    def keep(self, model: nn.Module, classes: int | None = None) -> None:
        """Keep the active adapter as it is now, in the place of what was kept before.

        Args:
            model: a `peft.PeftModel`.
            classes: how many outputs of the classifier have been trained so far; those that come
                later are not compared. None compares all.
        """
        peft_model: Any = model
        active = peft_model.active_adapter
        if self.adapter not in peft_model.peft_config:
            config = copy.deepcopy(peft_model.peft_config[active])
            peft_model.add_adapter(self.adapter, config)
        state = get_peft_model_state_dict(peft_model, adapter_name=active)
        kept = {name: tensor.detach().clone() for name, tensor in state.items()}
        set_peft_model_state_dict(peft_model, kept, adapter_name=self.adapter)
        peft_model.set_requires_grad(self.adapter, False)
        self._classes = classes

    def forget(self, model: nn.Module) -> None:
        """Delete what was kept, for example before the adapter is published."""
        peft_model: Any = model
        if self.adapter in peft_model.peft_config:
            peft_model.delete_adapter(self.adapter)

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, where a previous model has been kept."""
        model: Any = step.model
        if self.adapter not in getattr(model, "peft_config", {}):
            return {}
        if step.objective is None:
            raise ValueError(
                "PreviousDistillation runs the previous model by the objective, and a model's own "
                "loss has none: give the trainer `objective=`"
            )
        keywords = {"features": True} if self.of == "features" else {}
        batch = {name: value for name, value in step.batch.items() if name not in keywords}
        with as_adapter(model, self.adapter):
            previous = step.objective(model, **batch, **keywords)
        return super().terms(
            replace(step, outputs=self._old(step.outputs), frozen=self._old(previous))
        )

    def _old(self, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Outputs with the logits of the classes that there were."""
        logits = outputs.get("logits")
        if self._classes is None or not torch.is_tensor(logits):
            return outputs
        return {**outputs, "logits": logits[..., : self._classes]}

    def state_dict(self) -> State:
        """Return the number of classes; the adapter is saved with the model's."""
        return {"classes": self._classes}

    def load_state_dict(self, state: State) -> None:
        """Take back the number of classes."""
        self._classes = state["classes"]
