"""A YAML file with a command line on top: typed, complete, and wrong keys are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from graftune.cli import main
from graftune.cli.errors import UsageError
from graftune.cli.options import TrainOptions
from graftune.cli.parsing import OptionParser
from graftune.cli.training_options import ELSEWHERE, TrainArguments

BASE = "model: a/b\ndata: pictures\nuse_cpu: true\n"


def parse(tmp_path: Path, text: str, *arguments: str) -> tuple[TrainOptions, TrainArguments]:
    parser = OptionParser("train", "train", [TrainOptions, TrainArguments], ELSEWHERE)
    (tmp_path / "recipe.yaml").write_text(BASE + text)
    options, args = parser.parse_with_file(str(tmp_path / "recipe.yaml"), arguments)
    return options, args


def test_the_file_is_read_with_types(tmp_path: Path) -> None:
    options, args = parse(
        tmp_path,
        "learning_rate: 1e-3\nsave_strategy: no\nbf16: false\nmax_steps: 10\nwarmup_steps: 0.1\n"
        "lr_scheduler_type: cosine\nreport_to: [tensorboard, wandb]\nclasses: [cat, 3]\n"
        "template: a {}\nadapter: {r: 4, target_modules: [q_proj]}\nlr_scheduler_kwargs: {a: 1}\n"
        "eval_steps: null\npush_to: me/it\n",
    )
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (1e-3, 10, 0.1)
    assert (args.save_strategy.value, args.lr_scheduler_type.value) == ("no", "cosine")
    assert (args.bf16, args.use_cpu, args.eval_steps) == (False, True, None)
    assert args.report_to == ["tensorboard", "wandb"]
    assert args.lr_scheduler_kwargs == {"a": 1}
    assert (options.classes, options.template) == (["cat", "3"], ["a {}"])
    assert options.adapter == {"r": 4, "target_modules": ["q_proj"]}
    assert (options.push_to, options.recipe, options.regularizers) == ("me/it", "flora", None)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    options, args = parse(
        tmp_path,
        "learning_rate: 1e-3\nadapter: {r: 4, scale: 2.0}\nclasses: [cat]\nbf16: true\n"
        "regularizers:\n  - {name: l2_to_start, weight: 1.0}\n  - {name: frozen_distillation}\n",
        *("--learning-rate", "0.5", "--adapter.r", "8", "--adapter.target_modules=[a, b]"),
        *("--regularizers.0.weight", "0.1", "--classes", "owl", "hen", "--bf16", "no"),
        *("--lr_scheduler_kwargs.min_lr", "1e-5", "--max_steps", "-1"),
    )
    assert (args.learning_rate, args.bf16, args.max_steps) == (0.5, False, -1)
    assert options.adapter == {"r": 8, "scale": 2.0, "target_modules": ["a", "b"]}
    assert options.regularizers == [
        {"name": "l2_to_start", "weight": 0.1},
        {"name": "frozen_distillation"},
    ]
    assert options.classes == ["owl", "hen"]
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_structures_can_be_written_on_the_command_line(tmp_path: Path) -> None:
    options, _ = parse(tmp_path, "adapter: {r: 4}\n", "--adapter", "{r: 2}", "--regularizers", "[]")
    assert (options.adapter, options.regularizers) == ({"r": 2}, [])
    assert options.given_regularizers == []


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("lerning_rate: 1\n", (), "line 4: there is no key 'lerning_rate'. Did you mean 'learning"),
        ("adaptor: {r: 1}\n", (), "no key 'adaptor'. Did you mean 'adapter'"),
        ("max_steps: ten\n", (), "line 4: max_steps: invalid int value: 'ten'"),
        ("max_steps: [1]\n", (), "line 4: max_steps is a list; it takes one value"),
        ("max_steps: null\n", (), "line 4: max_steps has no value"),
        ("objective: clm\n", (), "objective: invalid choice: 'clm'"),
        ("adapter: [r]\n", (), "adapter is a list; it takes a mapping"),
        ("adapter: 8\n", (), "adapter is 8; it is a mapping such as"),
        ("regularizers: {a: 1}\n", (), "regularizers is a mapping; it takes a list"),
        ("resume_from_checkpoint: x\n", (), "Say `resume`"),
        ("eval_share: 1\n", (), "eval_share is 1.0"),
        ("", ("--lerning_rate", "1"), "no option --lerning_rate. Did you mean 'learning_rate'"),
        ("", ("--learning_rat=1",), "no option --learning_rat. Did you mean 'learning_rate'"),
        ("", ("--do_train",), "always trains"),
        ("", ("--learning_rate", "high"), "invalid float value: 'high'"),
        ("", ("--learning_rate",), "expected one argument"),
        ("", ("--adapter.r",), "--adapter.r needs a value"),
        ("", ("--adaptor.r", "1"), "no option --adaptor.r. Did you mean 'adapter'"),
        ("", ("--max_steps.r", "1"), "max_steps is one value without parts"),
        ("", ("--classes.0", "a"), "classes is one value without parts"),
        ("", ("--adapter.r", "1", "--adapter", "{r: 2}"), "are both given"),
        ("adapter: {r: 1}\n", ("--adapter.r.x", "1"), "there are no parts in 1"),
        ("regularizers: []\n", ("--regularizers.0.weight", "1"), "'0' is no number of one of"),
        ("", ("--adapter.r", "[1"), "is not YAML"),
        ("", ("stray",), "'stray' belongs to no option"),
    ],
)
def test_what_is_wrong_is_refused(
    tmp_path: Path, text: str, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        parse(tmp_path, text, *arguments)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_has_to_be_said(missing: str, fails: Any) -> None:
    given = {"model": "a", "data": "b"} | {missing: ""}
    arguments = [f"--{name}={value}" for name, value in given.items() if value]
    assert fails("train", *arguments).startswith(f"there is no {missing}: give `{missing}`")


def test_help_explains_every_field_with_its_default(run: Any) -> None:
    printed = " ".join(run("train", "--help").split())
    for kind in (TrainOptions, TrainArguments):
        for field in dataclasses.fields(kind):
            assert (f"--{field.name} " in printed) == field.init, field.name
            assert not field.init or field.metadata["help"]
    assert "What to measure on. None: a part of the data. (default: None)" in printed
    assert "--learning_rate" in printed
    assert "(default: 5e-05)" in printed
    assert "usage: graftune train [RECIPE.yaml] [--key value]" in printed


@pytest.mark.parametrize("command", ["eval", "inspect", "merge", "export", "push", "recipes"])
def test_the_other_commands_explain_themselves(command: str, run: Any) -> None:
    printed = run(command, "--help")
    assert f"usage: graftune {command}" in printed
    assert "Args:" not in printed


def test_the_commands_are_listed(run: Any) -> None:
    printed = run("--help")
    for command in ("train", "eval", "inspect", "merge", "export", "push", "recipes"):
        assert f"  {command} " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command"),
        (["trian"], "there is no command 'trian'. Did you mean 'train'"),
        (["--verbose", "train"], "unrecognized arguments: --verbose"),
        (["inspect"], "the following arguments are required: adapter"),
        (["inspect", "a", "--jsn"], "there is no option --jsn. Did you mean 'json'"),
        (["inspect", "a", "b"], "'b' belongs to no option"),
        (["inspect", "nowhere/at/all"], "is neither a folder with an adapter nor a repository"),
        (["export", "a", "--to", "loras", "--output", "x"], "invalid choice: 'loras'"),
        (["export", "a", "--output", "x"], "give --to, one of 'lora'"),
        (["export", "a", "--to", "diff", "--rank", "2", "--output", "x"], "--rank is for lora"),
        (["merge", "a"], "give --output"),
        (["eval", "a"], "there is no data: give --data"),
        (["push", "/nowhere", "me/it"], "no folder '/nowhere'"),
        (["train", "missing.yaml"], "there is no recipe file 'missing.yaml'"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments: list[str], message: str, fails: Any) -> None:
    assert message in fails(*arguments)


def test_a_traceback_only_on_demand() -> None:
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        main(["--debug", "train", "missing.yaml"])
