"""Import paths of earlier versions give the same modules and warn."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

from graftune.moved import MOVED, new_name


def fresh(name: str) -> object:
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MOVED)
def test_an_old_path_gives_the_module_that_took_over(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{name} is now {MOVED[name]}"):
        module = fresh(name)
    assert module is importlib.import_module(MOVED[name])


def test_modules_within_a_moved_package_come_along() -> None:
    assert new_name("graftune.integrations.hub.card") == "graftune.integrations.sharing.card"
    with pytest.warns(DeprecationWarning, match="graftune.cli.train"):
        module = fresh("graftune.commands.train")
    assert module is importlib.import_module("graftune.cli.train")


def test_names_imported_from_both_paths_are_the_same_and_pickle() -> None:
    code = (
        "import pickle, warnings; warnings.simplefilter('ignore')\n"
        "from graftune.integrations.trainer import CheckpointError as old\n"
        "from graftune.integrations.training import CheckpointError as new\n"
        "import graftune.commands.inspect_adapter\n"
        "from graftune.commands import main\n"
        "assert old is new and pickle.loads(pickle.dumps(old)) is new\n"
        "print(graftune.commands.inspect_adapter.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "graftune.cli.inspect_adapter", result.stderr


def test_the_module_that_took_over_can_still_be_reloaded() -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        fresh("graftune.adapters.messages")
    module = importlib.import_module("graftune.adapters.base.messages")
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == "graftune.adapters.base.messages"
    assert importlib.reload(module) is module


def test_a_class_pickled_under_its_old_path_is_read() -> None:
    from graftune.adapters.base.config import GraftConfig

    old = pickle.dumps(GraftConfig, protocol=0).replace(b"adapters.base.config", b"adapters.config")
    sys.modules.pop("graftune.adapters.config", None)
    with pytest.warns(DeprecationWarning, match="is now"):
        assert pickle.loads(old) is GraftConfig


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("graftune.integrations.nothing")
