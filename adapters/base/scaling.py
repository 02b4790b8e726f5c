"""How strongly each adapter of a layer acts, as diffusers sets it, and which act beside W now."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A tuner layer whose adapters have scales, W + s · ΔW, and which keeps W when it merges."""

    scale: dict[str, float]  # as configured
    scaling: dict[str, float]  # as applied; `set_scale` and `scale_layer` change it

    def _present(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.scaling]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times the configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.scale[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of active adapters by `scale`; None goes back to the configured one."""
        for adapter in self._present(self.active_adapters):
            if scale is None:
                self.scaling[adapter] = self.scale[adapter]
            else:
                self.scaling[adapter] /= scale

    def _applied(self) -> list[str]:
        """Return the adapters that act beside the base weights as they are now."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else self._present(self.active_adapters)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base model's own weights, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []

    @abstractmethod
    def _restore(self) -> None:
        """Put back what merging has overwritten, if anything."""
