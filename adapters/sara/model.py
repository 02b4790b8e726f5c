"""SaRA as a PEFT tuner: what is selected, where it is put, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from graftune.adapters.base.messages import listing
from graftune.adapters.base.modules import base_modules, is_target_parameter
from graftune.adapters.base.tuner import BaseModelMismatchError, enter_base_digest
from graftune.adapters.base.weight_tuner import WeightTuner
from graftune.adapters.sara import stored
from graftune.adapters.sara.config import SaraConfig
from graftune.adapters.sara.functional import (
    count_below,
    cutoff_for,
    magnitude_of_rank,
    selected,
    tensor_seed,
)
from graftune.adapters.sara.layer import SaraLayer
from graftune.adapters.sara.places import Places
from graftune.adapters.sara.root import SaraRoot
from graftune.adapters.sara.targets import (
    COMPILED,
    excludes_of_root,
    is_excluded,
    is_target_module,
    target_tensors,
)
from graftune.adapters.sara.values import SaraValues


class SaraModel(WeightTuner):
    """A model of whose weights some entries are trained in place (arXiv 2409.06633).

    Args:
        model: the base model.
        config: a `SaraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the values on the meta device, to be loaded next.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> model = get_peft_model(base, SaraConfig(fraction=0.1))
    """

    prefix = "sara_"
    tuner_layer_cls = SaraValues
    parameter_layer_cls = SaraLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)
    _targets: Sequence[str] = ()  # names of the tensors of the adapter that is being attached
    _done: set[str]  # and those of the modules that have it already
    _owners: frozenset[str] = frozenset()  # names of the modules that get a layer

    # What is selected.

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the vectors of values that the adapter would add to one target.

        At most those: how many there are is known once `config.cutoff` is.

        Raises:
            ValueError: the module has no parameters of its own.
        """
        names = [parameter] if parameter else [n for n, _ in module.named_parameters(recurse=False)]
        if not names:
            raise ValueError(f"{key!r} has no parameters of its own")
        if config.cutoff is None:
            return {f"sara_values.{name}": (getattr(module, name).numel(),) for name in names}
        places = {name: _places(config, f"{key}.{name}", getattr(module, name)) for name in names}
        return {f"sara_values.{name}": (p.count,) for name, p in places.items() if p.count}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Select entries over all targets and attach them."""
        config: Any = self.peft_config[adapter_name]
        if state_dict is not None:
            self._check_targets(model, config)
        with warnings.catch_warnings():
            if excludes_of_root(config, model):
                # PEFT looks among the modules alone, and warns where none was excluded.
                warnings.filterwarnings("ignore", "You have passed exclude_modules=")
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        merged = [k for k, x in model.named_modules() if isinstance(x, SaraValues) and x.merged]
        if merged:
            raise ValueError(
                "SaRA selects from the base model's own weights, and an adapter is merged into "
                f"them ({listing(merged, 3)}): call `unmerge_adapter` first"
            )
        for layer in model.modules():
            if isinstance(layer, SaraValues):
                layer.put_back()
        _maybe_include_all_linear_layers(config, model)  # enters them in the config
        tensors = target_tensors(config, model)
        self._targets, self._done = list(tensors), set()
        if not tensors:
            raise NoMatchingPeftModuleError(self._no_match_message(model, config))
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        dtype = "+".join(dtypes)
        if not is_from_file(config):
            config.base_dtype = dtype
            config.cutoff = _cutoff(config, tensors)
        elif config.base_dtype not in (None, dtype) and not config.store_indices:
            raise BaseModelMismatchError(
                f"the adapter's entries were selected from {config.base_dtype} weights, and those "
                f"of this base model are {dtype}: rounded, other ones are the smallest. Load the "
                f"base model in {config.base_dtype}; or save the adapter with store_indices=True, "
                "and it fits copies in any dtype"
            )

        self._owners = frozenset(
            name.rpartition(".")[0]
            for name, tensor in tensors.items()
            if waits_for_indices(config) or _mask(config, name, tensor).any()
        )
        if config.target_modules and not any(
            is_target_module(config, key) for key, _ in base_modules(model)
        ):
            warnings.warn(
                f"target_modules={config.target_modules} were set but no module was matched.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: Any, key: str
    ) -> Any:
        # Where nothing is selected there is no layer, and PEFT shall not list one.
        found = is_target_module(peft_config, key)
        key = key.removeprefix(COMPILED)
        return key in self._owners if found is not None and not is_excluded(found) else found

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Return the names of the parameters that are targeted: they came with their modules."""
        return [name for name in self._targets if is_target_parameter(peft_config, name)]

    # Attaching.

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
        if isinstance(target, SaraRoot):
            return  # found by the name it has in a file; what it holds comes last
        if isinstance(parent, SaraLayer):
            parent = parent.base_layer
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.MultiheadAttention):
            # Read by the attention, and adapted with it.
            key = f"{current_key}.out_proj"
            self._adapt(peft_config, adapter_name, base.out_proj, "out_proj", base, key)
        self._adapt(peft_config, adapter_name, target, target_name, parent, current_key)

    def _adapt(
        self,
        config: SaraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        key = key.removeprefix(COMPILED)
        if key in self._done:  # an attention's output projection, which came with it
            return
        self._done.add(key)
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        places = self._places_in(base, config, f"{key}.")
        if places is None:
            return
        if isinstance(target, SaraLayer):
            target.update_layer(adapter_name, config, places)
            return
        layer = SaraLayer(target, adapter_name, config, places)
        self._replace_module(parent, target_name, layer, target)
        self._activate(layer, config)

    def _places_in(
        self, module: nn.Module, config: SaraConfig, prefix: str
    ) -> dict[str, Places] | None:
        """Return the entries of a module's own parameters, or None if it has no part in it."""
        tensors = {
            name: tensor
            for name, tensor in module.named_parameters(recurse=False)
            if f"{prefix}{name}" in self._targets
        }
        if waits_for_indices(config):
            return {} if tensors else None
        found = ((n, _places(config, f"{prefix}{n}", tensor)) for n, tensor in tensors.items())
        return {name: of_name for name, of_name in found if of_name.count} or None

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        if self._injected is not None:
            adapter_name, low_cpu_mem_usage, _ = self._injected
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_root(model, adapter_name)
        super()._mark_only_adapters_as_trainable(model)

    def _adapt_root(self, model: nn.Module, adapter_name: str) -> None:
        """Train what the config targets of the parameters that the model itself owns."""
        config: Any = self.peft_config[adapter_name]
        places = self._places_in(model, config, "")
        if places is None:
            return
        root = SaraRoot.of(model)
        if root is not None:
            root.update_layer(adapter_name, config, places)
            return
        root = SaraRoot(model, adapter_name, config, places)
        root.enter()
        self._activate(root, config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if not isinstance(child, SaraRoot):  # which leaves by itself
            super()._replace_module(parent, child_name, new_module, child)

    def adapt_module(self, *args: Any, **kwargs: Any) -> None:
        """Put a layer around a module: what its own parameters are makes no difference."""
        self._adapt(*args, **kwargs)

    def adapt_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Adapt the parameters that were selected from."""
        self._adapt(*args[:-1], **kwargs)

    # Saving and loading.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        own: Any = config
        return tensors | stored.places_tensors(model, adapter_name, own.store_indices)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        places, values = stored.split(state_dict)
        layers = {
            cls._remove_adapter_name_from_key(f"{key}.sara_places.{adapter_name}", adapter_name): x
            for key, x in model.named_modules()
            if isinstance(x, SaraValues) and adapter_name in x.places
        }
        stored.enter_places(layers, places, values, adapter_name, config)
        own: Any = config
        if waits_for_indices(own):  # its layers are there now
            enter_base_digest(model, own, adapter_name, SaraValues)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, values)


def is_from_file(config: SaraConfig) -> bool:
    """Say whether a config was read with a saved adapter, whose selection it describes."""
    return config.base_digest is not None and not config.base_digest_is_fresh


def waits_for_indices(config: SaraConfig) -> bool:
    """Say whether the entries are those that a file lists, which is read next."""
    return is_from_file(config) and config.store_indices


def _places(config: SaraConfig, name: str, tensor: Tensor) -> Places:
    return Places.of(_mask(config, name, tensor))


def _mask(config: SaraConfig, name: str, tensor: Tensor) -> Tensor:
    assert config.cutoff is not None
    select: Any = config.select
    return selected(tensor, config.cutoff, select, tensor_seed(config.seed, name))


def _cutoff(config: SaraConfig, tensors: dict[str, Tensor]) -> float:
    """Return the magnitude, or for random selection the share, that a config comes down to.

    Raises:
        ValueError: it selects nothing, or everything.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    if config.threshold is not None:
        given, count = f"threshold={config.threshold}", count_below(tensors, config.threshold)
    elif config.fraction is not None:
        given, count = f"fraction={config.fraction}", int(config.fraction * total)
    else:
        assert config.num_parameters is not None
        given, count = f"num_parameters={config.num_parameters}", config.num_parameters
    if 0 < count < total:
        select: Any = config.select
        if config.threshold is not None and select == "smallest":
            return config.threshold
        cutoff = cutoff_for(tensors, count, select)
        if select != "smallest" or count_below(tensors, cutoff):
            return cutoff
        count = 0
    what = "nothing" if count == 0 else "everything"
    sizes = [magnitude_of_rank(tensors, rank) for rank in (0, total // 10, total - 1)]
    raise ValueError(
        f"{given} selects {what} of the {total:,} targeted weights, whose magnitudes reach from "
        f"{sizes[0]:.3g} to {sizes[2]:.3g} with a tenth of them below {sizes[1]:.3g}. Give a "
        "threshold in between, or a share of them with `fraction`"
    )
