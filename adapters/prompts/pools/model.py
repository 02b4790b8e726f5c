"""What the tuners of pools share: their places, and the query."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn

from graftune.adapters.base.hooks import check_module
from graftune.adapters.prompts.pools.query import Query, find_query
from graftune.adapters.prompts.prefix import PrefixTuner
from graftune.adapters.prompts.prefix.model import base_module

_PLACES = ("tower", "entry", "query")


class PoolTuner(PrefixTuner):
    """Base of tuners whose layers are `PoolLayer`s.

    A method defines `add_adapter`, beside `adapter_shapes`.
    """

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        missing = [name for name in _PLACES if getattr(config, name) is None]
        if missing and config.blocks is not None:
            raise ValueError(
                f"{type(config).__name__} needs {', '.join(missing)}: the names of modules of the "
                "model that the frozen features come from. graftune.wrap(model, config) finds "
                "them in vision transformers of transformers, timm and open_clip"
            )
        for name in _PLACES if not missing else ():
            check_module(model, name, getattr(config, name))
        super()._check_targets(model, config)

    @abstractmethod
    def add_adapter(
        self, config: Any, adapter_name: str, layer: Any, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Draw tensors of the shapes that `adapter_shapes` says, and add them to a layer."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self._layer_of(peft_config, target)
        shapes = self.adapter_shapes(peft_config, current_key, layer.__dict__["beside"], None)
        self.add_adapter(peft_config, adapter_name, layer, shapes)

    def _layer_of(self, config: Any, target: nn.Module) -> Any:
        """Return the layer in an attention, one that was just hooked in if there was none."""
        attention = base_module(target)
        layer: Any = getattr(attention, self.child, None)
        if layer is None:
            layer = self.tuner_layer_cls()
            query = find_query(self.model.modules()) or self._new_query(config)
            layer.ask(query)
            self.hook_layer(config, layer, attention)
            attention.add_module(self.child, layer)
        return layer

    def hook_layer(self, config: Any, layer: Any, attention: nn.Module) -> None:
        """Hook a layer's prompts into its attention."""
        layer.hook(attention, config.projections)

    def _new_query(self, config: Any) -> Query:
        model = self.model
        query = Query(
            model.get_submodule(config.tower),
            model.get_submodule(config.query),
            config.query_pool,
        )
        query.hook(model.get_submodule(config.entry))
        return query


def query_width(config: Any, attention: nn.Module) -> int:
    """Return the width of the hidden states, which the query's is."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention.embed_dim
    projection: Any = attention.get_submodule(config.projections[0])
    base: Any = base_module(projection)
    return base.in_features
