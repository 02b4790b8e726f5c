"""Entries of the parameters that a whole model owns, outside of any module in it.

There is no module to put a layer around: a position embedding of a timm ViT is read by the model's
own `forward`, `forward_features` and whatever other methods it has. Their values stand beside the
model's modules instead, and the model's class reads the parameters through them.
"""

from __future__ import annotations

import types
from functools import cache, partial
from typing import Any

from torch import nn

from graftune.adapters.sara.values import SaraValues

NAME = "own_parameters"  # of the values, among the model's modules


class SaraRoot(SaraValues):
    """What adapters train of the parameters that the model itself owns.

    It stands in the model as `own_parameters`. Until it leaves, reading one of the model's own
    parameters as an attribute (`model.pos_embed`) gives it with the active adapters' values in it;
    `model._parameters`, and with it `named_parameters` and `state_dict`, are as ever.
    """

    @staticmethod
    def of(model: nn.Module) -> SaraRoot | None:
        """Return what stands in a model, if anything does."""
        found = model._modules.get(NAME)
        return found if isinstance(found, SaraRoot) else None

    def _set_owner(self, owner: nn.Module) -> None:
        self.__dict__["_owner"] = owner  # past registration: the model holds this, not this it

    @property
    def owner(self) -> nn.Module:
        """The model."""
        return self.__dict__["_owner"]

    def base_parameter(self, name: str) -> Any:
        """Return one of the model's own parameters, as it is without adapters' values in it."""
        return self.owner._parameters[name]

    def enter(self) -> None:
        """Stand in the model, and let its parameters be read through this."""
        model = self.owner
        base: Any = type(model)
        names = tuple(name for name, _ in model.named_parameters(recurse=False))
        model.add_module(NAME, self)
        model.__class__ = _reading_class(base, names)

    def leave(self) -> None:
        """Give the model its own class back."""
        model = self.owner
        del model._modules[NAME]
        model.__class__ = type(model).__bases__[0]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Merge, or put back what is merged, and leave the model."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        self.leave()
        return self

    def __repr__(self) -> str:
        return f"sara.{super().__repr__()}"


def can_stand_in(model: nn.Module) -> bool:
    """Say whether a further module in a model leaves it as it is.

    Containers run or count whatever modules they have.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return SaraRoot.of(model) is not None or not (
        isinstance(model, containers) or hasattr(model, NAME)
    )


@cache
def _reading_class(base: Any, names: tuple[str, ...]) -> Any:
    """Return a class like `base`, of the same name, whose own parameters are read through values.

    As torch's parametrizations and `fully_shard` do it; objects of it can be copied and pickled.
    """

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update({name: property(partial(_read, name=name)) for name in names})
        namespace["__module__"], namespace["__qualname__"] = base.__module__, base.__qualname__
        namespace["__doc__"] = base.__doc__
        namespace["__reduce_ex__"] = _reduce

    return types.new_class(base.__name__, (base,), exec_body=fill)


def _read(model: nn.Module, name: str) -> Any:
    root = SaraRoot.of(model)
    return model._parameters[name] if root is None else root.read(name)


def _reduce(model: nn.Module, protocol: Any) -> tuple[Any, ...]:
    made = type(model)
    base: Any = made.__bases__[0]
    names = tuple(name for name, content in vars(made).items() if isinstance(content, property))
    _, _, *state = base.__reduce_ex__(model, protocol)
    return (_empty, (base, names), *state)


def _empty(base: Any, names: tuple[str, ...]) -> nn.Module:
    made = _reading_class(base, names)
    return made.__new__(made)
