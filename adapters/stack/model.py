"""Several methods' tuners on one model, behind one `BaseTuner`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.messages import listing
from graftune.adapters.base.modules import base_modules
from graftune.adapters.base.tuner import GraftTuner, enter_base_digest
from graftune.adapters.stack.config import StackConfig, method_of, tuner_class
from graftune.adapters.stack.merging import merge_order, take_off_layers
from graftune.adapters.stack.neighbours import attaching_order, check_neighbours
from graftune.adapters.stack.state import (
    part_class,
    stored_by_none,
    stored_by_part,
    tensors_of_part,
)


class StackModel(BaseTuner):
    """A model with the layers of several methods: each part has its own tuner.

    All of them hold an adapter by one and the same name, and all of them inject into the bare
    model: targets are named as there, whatever the other parts have put around them.

    Args:
        model: the base model.
        config: a `StackConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, to be loaded next.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = StackConfig(parts=[LoraConfig(target_modules=["0"]), FloraConfig(r=2)])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    """

    prefix = "stack_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)
    peft_config: dict[str, Any]  # of `StackConfig`s
    tuners: list[Any]  # one for each part; in a list, so that no module is registered twice

    # Attaching.

    @classmethod
    def around(cls, tuner: BaseTuner) -> StackModel:
        """Return a stack whose only part, as yet, is a tuner that is attached already.

        Raises:
            ValueError: the tuner has not exactly one adapter, has one that is merged, or its method
                cannot share a model.
        """
        name, config = _only(tuner)
        if any(m.merged for m in tuner.model.modules() if isinstance(m, BaseTunerLayer)):
            raise ValueError("the adapter is merged; call `model.unmerge_adapter()` first")
        stack = cls.__new__(cls)
        nn.Module.__init__(stack)
        stack.model = tuner.model
        stack.tuners = [tuner]
        stack.targeted_module_names = list(tuner.targeted_module_names)
        stack.targeted_parameter_names = list(tuner.targeted_parameter_names)
        stack.active_adapter = tuner.active_adapter
        # What is not trained now is not trained later.
        config.inference_mode = not any(
            parameter.requires_grad
            for layer in stack.layers_of(0)
            for parameter in layer.parameters()
        )
        shared = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
        given: dict[str, Any] = {field: getattr(config, field, None) for field in shared}
        stack.peft_config = {name: StackConfig(parts=[config], **given)}
        return stack

    def only_config(self) -> StackConfig:
        """Return the config of the only adapter.

        Raises:
            ValueError: there are several.
        """
        return _only(self)[1]

    def add_parts(self, parts: Sequence[PeftConfig]) -> None:
        """Attach further methods to the only adapter."""
        name, config = _only(self)
        for part in parts:
            config.parts.append(part)
            config.share_modules_to_save()
            self.tuners.append(None)
            self._attach(len(config.parts) - 1, config, name, low_cpu_mem_usage=False)
        check_neighbours(self.model)
        self.model.peft_config = self.peft_config
        config.base_digest = None
        enter_base_digest(self.model, config, name)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.tuners = []

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter's parts in their order, and record the base's digest.

        Raises:
            ValueError: there are no parts, or others than those of the adapter that is there.
        """
        config = self.peft_config[adapter_name]
        present = [method_of(next(iter(t.peft_config.values()))) for t in self.tuners]
        if present and config.methods != present:
            raise ValueError(
                f"the model has the methods {listing(present)}, and the new adapter "
                f"{listing(config.methods)}: adapters of one model have the same ones in the same "
                "order"
            )
        if not config.parts or state_dict is not None:
            raise ValueError(
                "StackConfig needs `parts`, the configs of its methods: "
                "StackConfig(parts=[LoraConfig(...), FloraConfig(...)])"
            )
        order = attaching_order([tuner_class(part).tuner_layer_cls for part in config.parts])
        self.tuners = self.tuners or [None] * len(order)
        for number in order:
            self._attach(number, config, adapter_name, low_cpu_mem_usage)
        check_neighbours(self.model)
        self.model.peft_config = self.peft_config
        enter_base_digest(model, config, adapter_name)

    def _attach(
        self, number: int, config: StackConfig, adapter_name: str, low_cpu_mem_usage: bool
    ) -> None:
        part = config.parts[number]
        frozen = part.inference_mode
        part.inference_mode = frozen or config.inference_mode
        part.base_check = "off"  # the digest over all parts is compared
        _resolve_all_linear(part, self.model)
        tuner = self.tuners[number]
        if tuner is not None:
            tuner.peft_config[adapter_name] = part
            tuner.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            # PEFT would take the configs of the part before for those of this one.
            vars(self.model).pop("peft_config", None)
            tuner = tuner_class(part)(
                self.model, {adapter_name: part}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
            self.tuners[number] = tuner
        for mine, theirs in (
            (self.targeted_module_names, tuner.targeted_module_names),
            (self.targeted_parameter_names, tuner.targeted_parameter_names),
        ):
            mine.extend(name for name in theirs if name not in mine)
        part.inference_mode = frozen

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a stack has no layers of its own: its parts' tuners create them")

    def layers_of(self, number: int) -> Iterator[Any]:
        """Yield the layers of one part."""
        for module in self.model.modules():
            if isinstance(module, self.tuners[number].tuner_layer_cls):
                yield module

    # Using.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` is not supported for several methods on one model; run one batch "
                "for each adapter"
            )
        with ExitStack() as stack:
            for tuner in self.tuners:
                if hasattr(type(tuner), "_enable_peft_forward_hooks"):
                    stack.enter_context(tuner._enable_peft_forward_hooks(*args, **kwargs))
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter in all parts; parts that are frozen stay so."""
        super().set_adapter(adapter_name, inference_mode)
        for tuner in self.tuners:
            tuner.active_adapter = adapter_name
        self._keep_frozen()

    def enable_adapter_layers(self) -> None:
        """Enable all parts; those that are frozen stay so."""
        super().enable_adapter_layers()
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        # PEFT lets whatever is active be trained.
        for name in self.active_adapters:
            for number, part in enumerate(self.peft_config[name].parts):
                for layer in self.layers_of(number) if part.inference_mode else ():
                    layer.set_requires_grad(name, requires_grad=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all parts."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        for tuner in self.tuners:
            tuner.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        self.active_adapter = self.tuners[0].active_adapter

    # Merging.

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the parts that change weights; warn of those that do not, which stay attached.

        Raises:
            ValueError: none of them can be merged.
        """
        merging, reasons = self._mergeable()
        if not merging:
            raise ValueError(_cannot_merge(reasons))
        if reasons:
            warnings.warn(f"{_cannot_merge(reasons)}. They stay attached and active", stacklevel=2)
        classes = tuple(tuner.tuner_layer_cls for tuner in merging)
        for layer in merge_order(self.model):
            if issubclass(type(layer), classes):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerge all parts, the last one merged first."""
        for layer in reversed(merge_order(self.model)):
            if layer.merged:
                layer.unmerge()

    def _mergeable(self) -> tuple[list[Any], dict[str, str]]:
        """Return the tuners whose layers stand around weights, and why the others do not merge.

        Raises:
            ValueError: one that could be merged cannot be as it is.
        """
        merging, reasons = [], {}
        for number, tuner in enumerate(self.tuners):
            if any(hasattr(layer, "base_layer") for layer in self.layers_of(number)):
                tuner._check_merge_allowed()
                merging.append(tuner)
                continue
            try:
                tuner._check_merge_allowed()
            except ValueError as error:
                reasons[method_of(next(iter(tuner.peft_config.values())))] = str(error)
        return merging, reasons

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            reasons = self._mergeable()[1]
            if reasons:
                raise ValueError(
                    f"{_cannot_merge(reasons)}. `model.merge_adapter()` merges the others and "
                    "leaves these attached"
                )
            self.merge_adapter(adapter_names, safe_merge)
            for layer in merge_order(self.model):
                layer.merged_adapters = []  # for good: some layers unmerge as they are taken off
        take_off_layers(self.model, merge, safe_merge, adapter_names)
        for tuner in self.tuners:  # those that stand around nothing have hooks
            tuner._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        vars(self.model).pop("peft_config", None)
        return self.model

    # Saving and loading: each part as its own method does it, under the names of the bare model.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for part in config.parts:  # type: ignore[attr-defined]
            own = tensors_of_part(model, part, state_dict)
            tensors |= part_class(tuner_class(part))._get_adapter_state_dict(
                model, part, adapter_name, own, unwanted_adapter_names
            )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return part_class(BaseTuner)._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        tensors = stored_by_none(state_dict)
        for part in config.parts:  # type: ignore[attr-defined]
            tensors |= part_class(tuner_class(part))._remap_adapter_state_dict_for_load(
                model, part, adapter_name, stored_by_part(part, state_dict)
            )
        return tensors

    def comparable_shapes(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return names and shapes in which a file of an adapter and the adapter have to agree."""
        for tuner in self.tuners:
            if isinstance(tuner, GraftTuner):
                shapes = tuner.comparable_shapes(shapes)
        return shapes


def _only(tuner: Any) -> tuple[str, Any]:
    """Return name and config of a tuner's only adapter."""
    if len(tuner.peft_config) != 1:
        raise ValueError(
            f"another method can be added to a model with one adapter, and this one has "
            f"{listing(tuner.peft_config)}; delete the others with `model.delete_adapter(name)`"
        )
    return next(iter(tuner.peft_config.items()))


def _resolve_all_linear(part: Any, model: nn.Module) -> None:
    """Name the linear layers of the bare model, which PEFT would look for among tuner layers."""
    wanted = getattr(part, "target_modules", None)
    if not isinstance(wanted, str) or wanted.lower() != "all-linear":
        return
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    part.target_modules = {
        key
        for key, module in base_modules(model)
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _cannot_merge(reasons: Mapping[str, str]) -> str:
    why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    return f"cannot merge {why}"
