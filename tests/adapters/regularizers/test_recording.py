"""Regularizers in configs of graftune and of PEFT: saved, copied, pickled, read without us."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

import graftune
from graftune.adapters.regularizers import record, recorded
from graftune.integrations.training import regularizers_of
from support.models import SmallCNN

CONFIGS = [graftune.FloraConfig(r=2), LoraConfig(r=2, target_modules=["head"])]
CHOSEN = [graftune.L2ToStart(0.1, of="merged"), graftune.FrozenDistillation(temperature=2.0)]


@pytest.mark.parametrize("config", CONFIGS, ids=["flora", "lora"])
def test_they_are_saved_with_the_adapter(config: PeftConfig, tmp_path: Path) -> None:
    model = graftune.wrap(SmallCNN(), config, regularizers=CHOSEN)
    assert regularizers_of(model) == CHOSEN
    assert isinstance(model.active_peft_config, type(config))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["regularizers"]
    assert saved == [regularizer.to_dict() for regularizer in CHOSEN]
    loaded = graftune.load(SmallCNN(), tmp_path, is_trainable=True, check_base="off")
    assert regularizers_of(loaded) == CHOSEN


@pytest.mark.parametrize("config", CONFIGS, ids=["flora", "lora"])
def test_the_given_config_is_not_changed_and_copies_keep_them(config: PeftConfig) -> None:
    before = config.to_dict()
    noted = record(config, CHOSEN)
    assert config.to_dict() == before
    for copied in (copy.deepcopy(noted), pickle.loads(pickle.dumps(noted)), record(noted, CHOSEN)):
        assert recorded(copied) == CHOSEN
        assert copied.to_dict() == noted.to_dict()
    assert recorded(record(noted, [])) == []


def test_none_takes_those_of_the_config_and_an_empty_list_none() -> None:
    config = record(graftune.FloraConfig(r=2), CHOSEN)
    assert regularizers_of(graftune.wrap(SmallCNN(), config)) == CHOSEN
    assert regularizers_of(graftune.wrap(SmallCNN(), config, regularizers=[])) == []


def test_an_unknown_one_is_refused_before_the_model_is_touched() -> None:
    model = SmallCNN()
    with pytest.raises(ValueError, match="Did you mean 'l2_to_start'"):
        graftune.wrap(model, "flora", regularizers=[{"name": "l2_to_star"}])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_peft_alone_reads_a_lora_with_regularizers(tmp_path: Path) -> None:
    graftune.wrap(SmallCNN(), CONFIGS[1], regularizers=CHOSEN).save_pretrained(tmp_path)
    code = (
        "import sys, peft; config = peft.PeftConfig.from_pretrained(sys.argv[1]);"
        "assert type(config) is peft.LoraConfig and config.r == 2;"
        "assert 'graftune' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
