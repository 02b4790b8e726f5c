"""FLoRA for parameters that a module uses by itself, such as a packed `in_proj_weight`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.layer_types import parameter_shape
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import init_tucker, resolve_ranks
from graftune.adapters.flora.layer import FloraLayer


class FloraParameters(FloraLayer):
    """A module that runs with W + ΔW in place of some of its parameters.

    Args:
        base_layer: the module that owns the parameters.
        adapter_name: name of the first adapter.
        config: its config.
        settings: ranks and scale for each parameter's name.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FloraConfig,
        settings: Mapping[str, tuple[int | Sequence[int], float]],
        **kwargs: Any,
    ) -> None:
        if isinstance(base_layer, BaseTunerLayer):
            raise ValueError(
                f"parameters {list(settings)} cannot be adapted: another method's "
                f"{type(base_layer).__name__} layer is wrapped around their module"
            )
        super().__init__(base_layer, adapter_name, **kwargs)
        *_, self.out_features, self.in_features = parameter_shape(
            getattr(base_layer, next(iter(settings)))
        )
        self.update_layer(adapter_name, config, settings)

    @staticmethod
    def _container() -> nn.Module:
        return nn.ModuleDict()

    def update_layer(
        self,
        adapter_name: str,
        config: FloraConfig,
        settings: Mapping[str, tuple[int | Sequence[int], float]],
    ) -> None:
        """Add parameters to an adapter; other parameters and adapters stay as they are."""
        (scale,) = {scale for _, scale in settings.values()}
        if adapter_name not in self.scaling:
            self._enter_adapter(adapter_name, config, scale)
        for name, (r, _) in settings.items():
            parameter = getattr(self.base_layer, name)
            shape = parameter_shape(parameter)
            ranks = resolve_ranks(r, shape)
            self._make_room(len(shape))
            core, factors = init_tucker(shape, ranks, config.init_weights)
            self.r.setdefault(adapter_name, {})[name] = ranks
            for container, value in zip(
                (self.flora_core, *(getattr(self, f"flora_factor{i}") for i in range(len(shape)))),
                (core, *factors),
                strict=True,
            ):
                if adapter_name not in container:
                    container[adapter_name] = nn.ParameterDict()
                value = _like(value, parameter)
                container[adapter_name][name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapts(self, name: str, adapter: str) -> bool:
        """Say whether the adapter changes the parameter."""
        return name in self.r.get(adapter, ())

    def adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        names = (name for adapter in self._present(adapter_names) for name in self.r[adapter])
        return list(dict.fromkeys(names))

    def tensors(self, adapter: str, name: str) -> tuple[Tensor, list[Tensor]] | None:
        if not self.adapts(name, adapter):
            return None
        axes = len(self.r[adapter][name])
        factors = [getattr(self, f"flora_factor{axis}")[adapter][name] for axis in range(axes)]
        return self.flora_core[adapter][name], factors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with W + Σ ΔW of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None and not self.disable_adapters:
            raise ValueError(
                f"`adapter_names` cannot be used where parameters are adapted by themselves (here "
                f"{self.adapted_names(self.scaling)}): one module call has one weight for the "
                "whole batch"
            )
        return super().forward(*args, **kwargs)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Move a fresh tensor to a parameter's device and floating dtype."""
    dtype = parameter.dtype if parameter.is_floating_point() else None
    device = None if parameter.device.type == "meta" else parameter.device
    return value.to(device=device, dtype=dtype)
