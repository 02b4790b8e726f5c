"""FloraConfig: what it accepts, refuses and keeps."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from peft import PeftConfig, PeftType

from graftune.adapters.flora import FloraConfig

GOOD = {
    "r": [16, 16, 2, 2],
    "scale": 4.0,
    "dropout": 0.01,
    "target_modules": ["conv", "fc"],
    "target_parameters": ["in_proj_weight"],
    "exclude_modules": ["head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"fc": 4, "conv1": [1, 2, 3, 3]},
    "scale_pattern": {"fc": 2.0},
    "modules_to_save": ["head"],
}


def test_round_trips(tmp_path) -> None:
    config = FloraConfig(**GOOD)
    assert config.peft_type is PeftType("FLORA")
    assert config.target_modules == {"conv", "fc"}
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FLORA"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is FloraConfig
    for name in GOOD:
        assert getattr(loaded, name) == getattr(config, name), name


def test_tuples_are_as_good_as_lists() -> None:
    assert FloraConfig(r=(4, 2), rank_pattern={"a": (1, 2)}) == FloraConfig(
        r=[4, 2], rank_pattern={"a": [1, 2]}
    )


def test_every_field_is_explained() -> None:
    for field in dataclasses.fields(FloraConfig):
        if field.name in FloraConfig.__annotations__:
            assert field.metadata["help"], field.name


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"r": 0}, "`r` must be a positive int"),
        ({"r": -3}, "got -3"),
        ({"r": 2.0}, "`r`"),
        ({"r": True}, "`r`"),
        ({"r": []}, "`r`"),
        ({"r": [4, 0]}, "`r`"),
        ({"r": "8"}, "`r`"),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern"),
        ({"scale": float("nan")}, "`scale` must be a finite number"),
        ({"scale": "big"}, "`scale`"),
        ({"scale_pattern": {"fc": float("inf")}}, "scale_pattern"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"target_modules": "fc.*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": "fc.*", "layers_pattern": "h"}, "layers_pattern"),
        ({"target_modules": ["fc"], "layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_bad_values_are_refused(kwargs, match) -> None:
    with pytest.raises(ValueError, match=match):
        FloraConfig(**kwargs)
