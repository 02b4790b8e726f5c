"""A layer around any module that runs with masked weights in place of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftune.adapters.base.feature_cache import FeatureCache, places
from graftune.adapters.base.layer_types import parameter_shape
from graftune.adapters.base.messages import listing
from graftune.adapters.base.parameter_layer import ParameterLayer, broken
from graftune.adapters.mask_tuning.config import MaskTuningConfig
from graftune.adapters.mask_tuning.functional import mask_of, masked_weight, random_mask, scores_of


class MaskTuningLayer(ParameterLayer):
    """A module that runs with W ⊙ mask in the place of some of its own parameters.

    The scores of an adapter are `mask_tuning_scores[adapter][parameter]`; where only a share of a
    weight has scores, their places are `mask_tuning_index[adapter][parameter]`. Several active
    adapters keep a weight if all of them do. Nothing is left on the module: each call substitutes
    the masked weights for its duration; whoever reads one from outside gets it masked as well. In
    evaluation, without gradients, a masked weight is kept until a mask or the weight changes,
    unless an adapter was made to `recompute`.

    Args:
        base_layer: the module, possibly inside other tuner layers.
        adapter_name: name of the first adapter.
        config: its config.
        parameters: names of the module's parameters to mask.
        shared: by parameter, the layer that has the scores already, of a weight that is tied.
    """

    method = "mask_tuning"
    acts_on_base = True  # whatever other methods' layers stand in between: merged before them
    mask_tuning_scores: nn.ModuleDict
    mask_tuning_index: nn.ModuleDict
    adapter_layer_names: tuple[str, ...] = ("mask_tuning_scores",)
    other_param_names: tuple[str, ...] = (
        "mask_tuning_index",
        "scale",
        "scaling",
        "threshold",
        "recompute",
        "pending",
        "shared",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MaskTuningConfig,
        parameters: Iterable[str],
        shared: dict[str, tuple[MaskTuningLayer, str]],
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.mask_tuning_scores = nn.ModuleDict()
        self.mask_tuning_index = nn.ModuleDict()
        self.threshold: dict[str, float] = {}
        self.recompute: dict[str, bool] = {}
        self.pending: dict[str, bool] = {}  # whose scores have no places yet
        self.shared: dict[str, dict[str, tuple[MaskTuningLayer, str]]] = {}
        self._evaluated: dict[str, FeatureCache] = {}  # masked weights, by parameter
        parameters = list(parameters)
        self.in_features, self.out_features = _features(self.get_base_layer(), parameters[0])
        self.update_layer(adapter_name, config, parameters, shared)

    # Adapters.

    def update_layer(
        self,
        adapter_name: str,
        config: MaskTuningConfig,
        parameters: Iterable[str],
        shared: dict[str, tuple[MaskTuningLayer, str]],
    ) -> None:
        """Start parameters of an adapter afresh; others and other adapters stay as they are."""
        self.scale[adapter_name] = self.scaling[adapter_name] = 1.0
        self.threshold[adapter_name] = config.threshold
        self.recompute[adapter_name] = config.recompute
        self.pending[adapter_name] = config.fraction is not None
        if adapter_name not in self.mask_tuning_scores:
            self.mask_tuning_scores[adapter_name] = nn.ParameterDict()
            self.mask_tuning_index[adapter_name] = BufferDict(persistent=True)
            self.shared[adapter_name] = {}
        for name in parameters:
            if name in shared:
                self.shared[adapter_name][name] = shared[name]
            else:
                self._add_scores(adapter_name, config, name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_scores(self, adapter: str, config: MaskTuningConfig, name: str) -> None:
        parameter = getattr(self.get_base_layer(), name)
        shape = parameter_shape(parameter)
        device = None if parameter.device.type == "meta" else parameter.device
        if config.fraction is not None:
            shape = (scored_entries(shape, config.fraction),)
            index = torch.zeros(shape, dtype=torch.int32, device=device)
            self.mask_tuning_index[adapter][name] = index  # type: ignore[operator]
        mask = torch.ones(shape, dtype=torch.bool) if config.init_weights else random_mask(shape)
        mask = mask.to(device)
        scores = scores_of(mask, config.init, config.threshold, parameter.dtype)
        self.mask_tuning_scores[adapter][name] = nn.Parameter(scores)  # type: ignore[operator]

    def adapts(self, name: str, adapter: str) -> bool:
        """Say whether the adapter masks the parameter."""
        if adapter not in self.threshold:
            return False
        return name in self.mask_tuning_scores[adapter] or name in self.shared[adapter]  # type: ignore[operator]

    def adapted_names(self, adapters: Iterable[str]) -> list[str]:
        """Return the names of the parameters that any of the adapters masks."""
        names: dict[str, None] = {}
        for adapter in adapters:
            if adapter in self.threshold:
                names |= dict.fromkeys(self.mask_tuning_scores[adapter].keys())  # type: ignore[operator]
                names |= dict.fromkeys(self.shared[adapter])
        return list(names)

    def own_names(self, adapter: str) -> list[str]:
        """Return the names of the parameters whose scores are this layer's own."""
        return list(self.mask_tuning_scores[adapter].keys()) if adapter in self.threshold else []  # type: ignore[operator]

    def scores(self, adapter: str, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the scores of one parameter, and their places where not all weights have any."""
        if name in self.shared[adapter]:
            layer, other = self.shared[adapter][name]
            return layer.scores(adapter, other)
        index: Any = self.mask_tuning_index[adapter]
        scores: Any = self.mask_tuning_scores[adapter]
        if name not in index:
            return scores[name], None
        return scores[name], index[name]

    def mask(self, adapter: str, name: str) -> Tensor:
        """Return an adapter's mask of one parameter: False where it is masked."""
        scores, index = self.scores(adapter, name)
        return mask_of(scores, self.threshold[adapter], self.full_shape(name), index)

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a base tensor, spread over processes or not."""
        return parameter_shape(getattr(self.get_base_layer(), name))

    def set_scores(
        self, adapter: str, name: str, scores: Tensor, index: Tensor | None = None
    ) -> None:
        """Overwrite the scores of one parameter and, where it has any, their places."""
        with torch.no_grad():
            own, places = self.scores(adapter, name)
            own.copy_(scores)
            if places is not None and index is not None:
                places.copy_(index)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Not to its dtype: a score rounded to it could come to lie on the threshold's other side.
        if adapter_name not in self.threshold:
            return
        names = self.adapted_names([adapter_name])
        device = device or getattr(self.get_base_layer(), names[0]).device
        for held in (self.mask_tuning_scores, self.mask_tuning_index):
            tensors = [*held[adapter_name].parameters(), *held[adapter_name].buffers()]
            if not any(tensor.device.type == "meta" for tensor in tensors):
                held[adapter_name].to(device)

    # Scales, as diffusers sets them.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Do nothing for a scale of one."""
        _check_scale(scale)

    def scale_layer(self, scale: float) -> None:
        """Do nothing for a scale of one."""
        _check_scale(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Do nothing for a scale of one."""
        _check_scale(1.0 if scale is None else scale)

    # Running with masked weights.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with W ⊙ mask of the active adapters."""
        adapters = self._applied()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        again = any(self.recompute[adapter] for adapter in adapters)
        # A compiler decides by itself what to keep and what to compute again.
        if again and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(lambda: self._run(adapters, args, kwargs), use_reentrant=False)
        return self._run(adapters, args, kwargs)

    def _run(self, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = self._may_keep(adapters)
        if not kept:
            self._evaluated.clear()
        masked = {
            name: (self._kept if kept else self.effective)(name, adapters)
            for name in self.adapted_names(adapters)
        }
        return self.call_base(masked, args, kwargs)

    def _may_keep(self, adapters: Sequence[str]) -> bool:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not any(self.recompute[adapter] for adapter in adapters)

    def _kept(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return what `effective` does, computed once for as long as nothing of it changes."""
        tensors = [getattr(self.get_base_layer(), name)]
        for adapter in adapters:
            if self.adapts(name, adapter):
                tensors += [tensor for tensor in self.scores(adapter, name) if tensor is not None]
        cache = self._evaluated.setdefault(name, FeatureCache())
        state = (*adapters, *places(tensors))
        return cache.get(self, state, lambda: self.effective(name, adapters))

    def effective(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return a base tensor masked by the given adapters, with gradients to their scores."""
        weight = self.original(name)
        for adapter in adapters:
            if self.adapts(name, adapter):
                scores, index = self.scores(adapter, name)
                weight = masked_weight(weight, scores, self.threshold[adapter], index)
        return weight

    def _applied(self) -> list[str]:
        adapters = super()._applied()
        if any(self.pending[adapter] for adapter in adapters):
            if torch.is_grad_enabled():
                raise RuntimeError(selection_pending(adapters, "training"))
            return [adapter for adapter in adapters if not self.pending[adapter]]
        return adapters

    def check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError if any of the adapters has no selection yet, or scores that are NaN."""
        adapters = self._present(adapter_names)
        if any(self.pending[adapter] for adapter in adapters):
            raise ValueError(selection_pending(adapters, "merging"))
        for adapter in adapters:
            for name in self.adapted_names([adapter]):
                if torch.isnan(self.scores(adapter, name)[0]).any():
                    raise ValueError(broken([adapter]))


def scored_entries(shape: Sequence[int], fraction: float) -> int:
    """Return how many entries of a tensor have scores: at least one."""
    return max(1, round(fraction * torch.Size(shape).numel()))


def _features(module: Any, parameter: str) -> tuple[int, int]:
    """Return how many features go into a module and come out."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
        if all(hasattr(module, name) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    *_, inputs, outputs = (1, 1, *reversed(parameter_shape(getattr(module, parameter))))
    return inputs, outputs


def _check_scale(scale: float) -> None:
    if scale != 1:
        raise ValueError(
            f"a mask has no scale, got {scale!r}: switch the adapter off with `disable_adapter`, "
            "or set another one active"
        )


def selection_pending(adapters: Sequence[str], what: str) -> str:
    """Return the error for an adapter whose scores have no indices yet."""
    return (
        f"{what} with the adapter {listing(adapters)} needs its selection, which is pending: with "
        "`fraction` only the most important weights get scores. Call "
        "graftune.adapters.mask_tuning.select(model, batches, loss) first; graftune.Trainer does "
        "when it starts"
    )
