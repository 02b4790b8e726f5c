"""FLoRA as a PEFT tuner: which layer gets which adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import nn

from graftune.adapters.base.layer_types import CONVOLUTIONS, TRANSPOSED, parameter_shape
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.weight_tuner import WeightTuner
from graftune.adapters.flora.batches import mixed_batch
from graftune.adapters.flora.combine import combined_config, places
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.conv import ConvNd, ConvTransposeNd
from graftune.adapters.flora.embedding import Embedding
from graftune.adapters.flora.functional import resolve_ranks
from graftune.adapters.flora.layer import FloraLayer
from graftune.adapters.flora.linear import Linear
from graftune.adapters.flora.parameter import FloraParameters
from graftune.adapters.flora.shapes import weight_shape
from graftune.adapters.flora.targets import has_no_input, rank_setting, scale_setting, shapes_at
from graftune.adapters.flora.weight import FloraWeight

# These read the weights of their linear layers at least at times, instead of calling the layers.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class FloraModel(WeightTuner):
    """A model with FLoRA adapters: W' = W + s · G ×_0 U_0 ... ×_{N-1} U_{N-1} (arXiv 2405.14739).

    Args:
        model: the base model.
        config: a `FloraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, to be loaded next.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
        >>> model = get_peft_model(base, FloraConfig(r=2, target_modules=["0"]))
    """

    prefix = "flora_"
    tuner_layer_cls = FloraLayer
    parameter_layer_cls = FloraParameters
    peft_config: dict[str, Any]  # of `FloraConfig`s

    # What fits where.

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the adapter would add to one target.

        Raises:
            TypeError: the module's type is not supported.
            ValueError: the ranks do not suit the weight.
        """
        return shapes_at(config, key, module, parameter)

    # Attaching.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter, and warn once of ranks that were cut and of adapters too large."""
        self._cut: list[str] = []
        self._too_large: list[str] = []
        self._without_dropout: list[str] = []
        self._keys: set[str] = set()
        with warnings.catch_warnings():
            # PEFT knows the modules that a pattern may mean, not the parameters.
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
        self._warn_of_idle_patterns(self.peft_config[adapter_name])
        self._warn_of_missing_dropout(self.peft_config[adapter_name])
        if self._cut:
            warnings.warn(
                f"ranks beyond a dimension of the weight were cut to it in {listing(self._cut)}",
                stacklevel=2,
            )
        if self._too_large and state_dict is None:  # else there is nothing left to choose
            warnings.warn(
                "the adapter has at least as many numbers as the weight itself in "
                f"{listing(self._too_large)}: give smaller ranks with `r` or `rank_pattern`, or "
                "leave them out with `exclude_modules`",
                stacklevel=2,
            )

    def _warn_of_missing_dropout(self, config: FloraConfig) -> None:
        if config.dropout > 0 and self._without_dropout:
            warnings.warn(
                f"dropout={config.dropout} does not act on {listing(self._without_dropout)}: these "
                "run with W + ΔW, so the added branch has no input of its own to drop from",
                stacklevel=3,
            )

    def _warn_of_idle_patterns(self, config: FloraConfig) -> None:
        for field in ("rank_pattern", "scale_pattern"):
            idle = [
                pattern
                for pattern in getattr(config, field)
                if not any(get_pattern_key([pattern], key) == pattern for key in self._keys)
            ]
            if idle:
                warnings.warn(
                    f"{field} has keys that match nothing that is adapted: {listing(idle)}"
                    f"{nearest(idle[0], self._keys)}",
                    stacklevel=3,
                )

    def adapt_module(
        self,
        config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        shape = weight_shape(base)
        r, scale = rank_setting(config, key), scale_setting(config, key)
        self._note_sizes(key, r, shape)
        if has_no_input(base):
            self._without_dropout.append(key)
        if isinstance(target, FloraWeight):
            target.update_layer(adapter_name, config, r, scale)
            return
        layer = _layer_class(base)(
            target,
            adapter_name,
            config,
            r,
            scale,
            weight_is_read=isinstance(parent, _READERS),
            **get_quantization_kwargs(self.model),
        )
        self._replace_module(parent, target_name, layer, target)
        self._activate(layer, config)

    def adapt_parameters(
        self,
        config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
        names: list[str],
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        settings = {}
        self._keys.add(key)
        for name in names:
            r = rank_setting(config, f"{key}.{name}", key)
            settings[name] = (r, scale_setting(config, f"{key}.{name}", key))
            self._without_dropout.append(f"{key}.{name}")
            self._note_sizes(f"{key}.{name}", r, parameter_shape(getattr(base, name)))
        if isinstance(target, FloraParameters):
            target.update_layer(adapter_name, config, settings)
            return
        layer = FloraParameters(target, adapter_name, config, settings)
        self._replace_module(parent, target_name, layer, target)
        self._activate(layer, config)

    def _note_sizes(self, key: str, r: int | list[int], shape: tuple[int, ...]) -> None:
        self._keys.add(key)
        ranks = resolve_ranks(r, shape)
        if not isinstance(r, int) and tuple(r) != ranks:
            self._cut.append(key)
        numbers = math.prod(ranks) + sum(d * n for d, n in zip(shape, ranks, strict=True))
        if numbers >= math.prod(shape):
            self._too_large.append(key)

    def comes_with_module(self, target: nn.Module, adapter_name: str, key: str, name: str) -> bool:
        """Say whether a parameter that `target_parameters` names is adapted with its module.

        Raises:
            ValueError: its module is adapted, too.
        """
        if isinstance(target, FloraWeight):
            if adapter_name in target.scaling and target.weight_is_read and name == "weight":
                return True  # came with its attention
            raise ValueError(
                f"the parameter {key}.{name} cannot be adapted by itself: its module is adapted, "
                "too. Name it in only one of `target_modules` and `target_parameters`"
            )
        return super().comes_with_module(target, adapter_name, key, name)

    # Several adapters.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        beams = kwargs.get("num_beams")
        context = (
            nullcontext()
            if adapter_names is None
            else mixed_batch(self.model, adapter_names, beams if isinstance(beams, int) else 1)
        )
        with context:
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter whose ΔW is Σ_i w_i ΔW_i, exactly.

        The sum of Tucker forms is one with a block-diagonal core and concatenated factors; its
        ranks are the sums of theirs, up to the dimensions of the weight.

        Args:
            adapters: names of the adapters to add up.
            weights: w_i, one for each.
            adapter_name: name of the new adapter. It is not made active.
            combination_type: "cat". LoRA's other types have no counterpart: they approximate, or
                add factors that only mean something as a product.

        Raises:
            ValueError: an adapter does not exist, the name is taken, numbers do not match, the
                type is another, or adapters train the same module in full (`modules_to_save`).

        Example:
            >>> model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")  # doctest: +SKIP
        """
        if combination_type != "cat":
            raise ValueError(
                f"combination_type={combination_type!r} is not supported by FLoRA: use 'cat', "
                "which is the exact sum"
            )
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(
                f"Adapter {missing[0]} does not exist.{nearest(missing[0], self.peft_config)} "
                f"There are {listing(self.peft_config)}."
            )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"got {len(weights)} weights for {len(adapters)} adapters")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: choose another name")
        shared = [
            module
            for module in self.modules()
            if isinstance(module, ModulesToSaveWrapper)
            and sum(name in module.modules_to_save for name in adapters) > 1
        ]
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with "
                f"modules_to_save, but found {len(shared)} such instance(s)."
            )
        tensors = {
            place: layer.weighted_sum(adapters, weights, place[1] or "weight")
            for place, layer in places(self.model, adapters).items()
        }
        configs = [self.peft_config[name] for name in adapters]
        self.peft_config[adapter_name] = combined_config(configs, tensors)
        self.inject_adapter(self.model, adapter_name)
        for place, layer in places(self.model, [adapter_name]).items():
            layer.load_tensors(adapter_name, place[1] or "weight", tensors[place])


def _layer_class(base: nn.Module) -> type[FloraWeight]:
    if isinstance(base, CONVOLUTIONS):
        return ConvNd
    if isinstance(base, TRANSPOSED):
        return ConvTransposeNd
    return Embedding if isinstance(base, nn.Embedding) else Linear
