"""Private names of transformers are checked on import: none is lost without an error."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import graftune
from graftune.integrations.training.transformers_private import METHODS, check_names


def changed(**names: Any) -> type:
    """transformers' trainer with other things under some names."""
    return type("Changed", (transformers.Trainer,), names)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_missing_method_raises(name: str) -> None:
    with pytest.raises(ImportError, match=rf"Trainer\.{name} is missing.*pip install"):
        check_names(changed(**{name: None}))


def test_a_lost_parameter_raises() -> None:
    def save(self: Any, output_dir: str | None = None) -> None:
        pass

    message = rf"transformers {transformers.__version__}: Trainer._save no longer takes state_dict"
    with pytest.raises(ImportError, match=message):
        check_names(changed(_save=save))


def test_lost_rotation_and_attributes_raise() -> None:
    def rotate(output_dir: str) -> None:
        pass

    def init(self: Any) -> None:
        pass

    with pytest.raises(ImportError, match=r"rotate_checkpoints no longer takes save_total_limit"):
        check_names(rotate=rotate)
    with pytest.raises(ImportError, match=r"_signature_columns is missing.*_train_batch_size is"):
        check_names(changed(__init__=init))


def test_every_private_override_is_checked() -> None:
    mixins = graftune.Trainer.__mro__[: graftune.Trainer.__mro__.index(transformers.Trainer)]
    of_transformers = {name for name in dir(transformers.Trainer) if name.startswith("_")}
    overridden = {
        name
        for mixin in mixins
        for name in vars(mixin)
        if name in of_transformers and not name.startswith("__")
    }
    assert overridden - {"_abc_impl"} <= set(METHODS)
