"""Import paths of earlier versions: each leads to the module that took over, with a warning.

The old path gives the same module object, so that classes, `isinstance` and pickles are the same
under both names.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_BASE = (
    "attached",
    "checkpoint",
    "classifier",
    "config",
    "digest",
    "feature_cache",
    "folder",
    "frozen",
    "messages",
    "modules",
    "registration",
    "restore",
    "sharded",
    "sparse_parts",
    "tuner",
    "weights",
)

# The old name of a module or package, and its name now. A package takes its modules along.
MOVED = {
    **{f"graftune.adapters.{name}": f"graftune.adapters.base.{name}" for name in _BASE},
    "graftune.adapters.deep_prompts": "graftune.adapters.prompts.deep",
    "graftune.adapters.one_prompt": "graftune.adapters.prompts.one",
    "graftune.adapters.prefixes": "graftune.adapters.prompts.prefix",
    "graftune.adapters.prompt_pools": "graftune.adapters.prompts.pools",
    "graftune.commands": "graftune.cli",
    "graftune.integrations.base_models": "graftune.integrations.libraries.base_models",
    "graftune.integrations.class_lists": "graftune.integrations.sharing.class_lists",
    "graftune.integrations.export": "graftune.integrations.sharing.export",
    "graftune.integrations.families": "graftune.integrations.libraries.families",
    "graftune.integrations.hub": "graftune.integrations.sharing",
    "graftune.integrations.pipelines": "graftune.integrations.libraries.pipelines",
    "graftune.integrations.trainer": "graftune.integrations.training",
}


def new_name(name: str) -> str | None:
    """Return the name that a module has now; None where it never moved.

    Example:
        >>> new_name("graftune.integrations.hub.card")
        'graftune.integrations.sharing.card'
    """
    head, tail = name, ""
    while head:
        if head in MOVED:
            return MOVED[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return None


class _MovedLoader(Loader):
    """Gives the module that took over, which is loaded already, and leaves it as it is."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just entered the old name's spec, by which `reload` would fail.
        module.__spec__ = self._spec


class _MovedFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = new_name(fullname) if fullname.startswith("graftune.") else None
        if name is None:
            return None
        module = importlib.import_module(name)
        warnings.warn(
            f"the module {fullname} is now {name}: import that instead",
            DeprecationWarning,
            stacklevel=2,
        )
        return ModuleSpec(fullname, _MovedLoader(module), is_package=hasattr(module, "__path__"))


def install() -> None:
    """Let the old import paths work; a second call does nothing."""
    if not any(type(finder).__qualname__ == _MovedFinder.__qualname__ for finder in sys.meta_path):
        # Before the usual finders, which would load a second copy of a module from the folder of
        # the package that took over.
        sys.meta_path.insert(0, _MovedFinder())
