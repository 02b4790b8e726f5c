"""PEFT knows a registered method as one of its own."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

import graftune
from graftune.adapters.base.registration import add_peft_type, register
from graftune.adapters.flora import FloraConfig, FloraModel


def test_the_member_is_like_any_other() -> None:
    member = add_peft_type("FLORA")
    assert member is PeftType.FLORA is PeftType("FLORA") is PeftType["FLORA"]
    assert member == "FLORA"
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert (member.name, member.value) == ("FLORA", "FLORA")
    assert repr(member) == "<PeftType.FLORA: 'FLORA'>"
    assert json.dumps(member) == '"FLORA"'
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert len({*PeftType}) == len(list(PeftType))


def test_adding_twice_and_reloading_change_nothing() -> None:
    members = list(PeftType)
    assert add_peft_type("FLORA") is PeftType.FLORA
    register("flora", FloraConfig, FloraModel)
    importlib.reload(importlib.import_module("graftune.adapters.base.registration"))
    importlib.reload(importlib.import_module("graftune.adapters.flora"))
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.FLORA] == "flora_"


def test_a_taken_name_is_an_import_error_that_names_the_owner() -> None:
    class OtherConfig(graftune.FloraConfig):
        pass

    with pytest.raises(ImportError, match=r"'flora' is taken by graftune.*FloraConfig"):
        register("flora", OtherConfig, FloraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"].__qualname__ == "FloraConfig"
