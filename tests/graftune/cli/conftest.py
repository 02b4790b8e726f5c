"""Base models, data and trained adapters that several tests of the command line use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftune.cli import main
from support import folders

Run = Callable[..., str]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folders.clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folders.causal_lm(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folders.classifier(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folders.pictures(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folders.texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that ends well, and return what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> str:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that fails as it should, and return the one line it said."""

    def fails(*arguments: Any) -> str:
        code = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if "graftune: " in line]
        assert code == 2
        assert len(lines) == 1, lines
        return lines[0].partition("graftune: ")[2]

    return fails


def recipe(folder: Path, **values: Any) -> Path:
    """Write a recipe for a short run on the CPU."""
    import yaml

    given = {
        "max_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "adapter": {"r": 2},
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
        **values,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
    return file


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Path]:
    return lambda **values: recipe(tmp_path, **values)


@pytest.fixture(scope="session")
def trained(clip: str, pictures: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small CLIP, trained by the command line with a regularizer."""
    folder = tmp_path_factory.mktemp("trained")
    file = recipe(
        folder,
        model=clip,
        data=pictures,
        template="a picture of {}",
        classes="first-half",
        regularizers=[{"name": "frozen_distillation", "weight": 0.5}],
    )
    assert main(["train", str(file)]) == 0
    return folder / "out"
