"""Which fields of a config users set, in `graftune.wrap`, at the command line and in cards."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftConfig

import graftune
from graftune.adapters.base.config import user_fields
from graftune.cli.adapt import settable
from graftune.recipe_table import recipes

CLASSES = [*dict.fromkeys(recipe.config_cls for recipe in recipes().values()), LoraConfig]
INTERNAL = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_digest",
    "base_dtype",
    "cutoff",
    "regularizers",
}


@pytest.mark.parametrize("config_cls", CLASSES)
def test_what_is_filled_in_is_no_field_of_a_user_and_the_task_type_is(
    config_cls: type[PeftConfig],
) -> None:
    for found in (user_fields(config_cls), settable(config_cls)):
        assert not INTERNAL & found.keys()
        assert "task_type" in found


def test_fields_keep_their_order_and_defaults() -> None:
    found = user_fields(graftune.SaraConfig)
    assert found["num_parameters"].default is None
    assert [name for name in found if name.startswith("target_")] == [
        "target_modules",
        "target_parameters",
    ]
