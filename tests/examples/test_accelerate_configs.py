"""The launch configs say what accelerate understands, and mean what their comments say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, launch

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
TYPES = {
    "ddp.yaml": DistributedType.MULTI_GPU,
    "fsdp2.yaml": DistributedType.FSDP,
    "zero2.yaml": DistributedType.DEEPSPEED,
    "zero3.yaml": DistributedType.DEEPSPEED,
}


def launched(name: str) -> Any:
    """The arguments of `accelerate launch --config_file`, as it completes them."""
    parser = launch_command_parser()
    given = ["--config_file", str(FOLDER / name), "--num_processes", "4", "train.py"]
    return _validate_launch_command(parser.parse_args(given))[0]


def test_all_of_them_are_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_every_key(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == TYPES[name]
    known = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load((FOLDER / name).read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        # accelerate passes over inner keys that it does not know.
        assert set(content.get(section, {})) <= known


@pytest.mark.parametrize("name", TYPES)
def test_the_command_line_decides_on_the_number_of_processes(name: str) -> None:
    arguments = launched(name)
    assert arguments.num_processes == 4
    assert arguments.mixed_precision == "bf16"
    assert arguments.use_fsdp == (name == "fsdp2.yaml")
    assert arguments.use_deepspeed == name.startswith("zero")
    assert arguments.multi_gpu == (name == "ddp.yaml")


def test_the_plugin_is_fsdp_2_with_whole_states(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched("fsdp2.yaml")
    for key, value in launch.prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize(("name", "stage"), [("zero2.yaml", "2"), ("zero3.yaml", "3")])
def test_deepspeed_gets_its_stage(name: str, stage: str) -> None:
    arguments = launched(name)
    arguments.deepspeed_fields_from_accelerate_config = ""  # which accelerate fills in at last
    _, environment = launch.prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    if stage == "3":
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
