"""Tasks are learned one after the other, and whatever ends a run leaves those before it."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import graftune
from graftune.adapters.regularizers import (
    ElasticWeightConsolidation,
    FrozenDistillation,
    L2ToStart,
    PreviousDistillation,
)
from graftune.integrations.class_incremental import ClassListError, TaskRecord, TaskSplit
from graftune.integrations.objectives import ImageClassifier
from graftune.integrations.training import regularizers_of
from support.models import MODELS
from support.processes import launch, succeed
from support.tasks import (
    adapted,
    images,
    interrupt,
    killed_or_done,
    outliers,
    sequence,
    split,
)

QUIET = {"save_strategy": "no", "num_train_epochs": 1}


class Interrupted(Exception):
    """What ends a run in these tests."""


def stop() -> None:
    raise Interrupted


def adapter(folder: Path, task: int = 2) -> bytes:
    return (folder / f"task-{task}" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def what_was_imported_is_no_garbage() -> Iterator[None]:
    """Half of a short run's time is the search of all that the libraries hold, after each phase."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    sequence(folder, task_aware=True).train()
    return folder


def test_what_a_run_leaves(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["task-0", "task-1", "task-2"]
    record = TaskRecord.read(whole / "task-2")
    assert record.order == split().order
    assert (record.seed, record.done) == (42, 3)
    assert [len(row) for row in record.accuracies] == [1, 2, 3]
    for agnostic, aware in zip(record.accuracies, record.task_aware, strict=True):
        assert all(a <= b for a, b in zip(agnostic, aware, strict=True))
    said = json.loads((whole / "task-2" / "class_incremental.json").read_text())
    assert said["metrics"] == record.metrics
    assert "forgetting" in record.summary()
    earlier = TaskRecord.read(whole / "task-1")
    assert earlier.accuracies == record.accuracies[:2]
    assert earlier.order.tasks == record.order.tasks[:2]
    size = sum(file.stat().st_size for file in (whole / "task-2").rglob("*") if file.is_file())
    assert size < 2**20


def test_the_adapter_is_what_was_measured(whole: Path) -> None:
    model = graftune.load(MODELS["transformers-vit"].build(), whole / "task-2").eval()
    record = TaskRecord.read(whole / "task-2")
    for task, part in enumerate(record.order.split(images(2, seed=1), label="labels")):
        pixels = torch.stack([row["pixel_values"] for row in part])
        labels = torch.tensor([row["labels"] for row in part])
        with torch.no_grad():
            logits = ImageClassifier()(model, pixels)["logits"]
        assert logits.shape[1] == 6
        right = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert right == pytest.approx(record.accuracies[-1][task])


def test_it_learns(tmp_path: Path) -> None:
    longer = {"num_train_epochs": 20, "save_strategy": "no"}
    train = split([[0, 1, 2], [3, 4, 5]])
    record = sequence(tmp_path, train=train, arguments_=longer, task_aware=True).train()
    assert min(record.task_aware[0][0], record.task_aware[1][1]) > 60


def test_the_outlier_phase_trains_the_classifier_alone(tmp_path: Path) -> None:
    one = split([[0, 1]])
    for name, regularizers in (("without", []), ("with", [outliers()])):
        sequence(tmp_path / name, train=one, regularizers=regularizers).train()
    states = [
        graftune.load(MODELS["transformers-vit"].build(), tmp_path / name / "task-0").state_dict()
        for name in ("without", "with")
    ]
    changed = {n for n, tensor in states[0].items() if not torch.equal(tensor, states[1][n])}
    assert changed
    assert all(".classifier.modules_to_save." in name for name in changed)


def test_old_rows_of_the_classifier_stay_in_later_tasks(whole: Path) -> None:
    """Their logits are −∞ in the loss: nothing but a regularizer could move them."""
    weights = [
        graftune.load(MODELS["transformers-vit"].build(), whole / f"task-{task}")
        .get_base_model()
        .classifier.weight.detach()
        for task in (0, 2)
    ]
    assert torch.equal(weights[0][:2], weights[1][:2])


def test_interrupted_again_and_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each phase of a task, between them, and before a folder is whole and in its place."""
    places = [
        ("training_step", 2, 0),  # a normal phase has 2 steps, an outlier phase 2
        ("training_step", 3, 0),  # the second of the outlier phase
        ("list_files", 1, 0),
        ("move", 1, 0),
        ("_measure", 2, 1),  # of the second task
        ("training_step", 1, 2),  # of the third task
        ("training_step", 4, 2),
    ]
    for at, count, done in places:
        with monkeypatch.context() as patch:
            interrupt(patch, at, count, stop)
            with pytest.raises(Interrupted):
                sequence(tmp_path, task_aware=True).train(resume=True)
        assert [path.name for path in sorted(tmp_path.glob("task-*"))] == [
            f"task-{task}" for task in range(done)
        ]
        for task in range(done):
            assert TaskRecord.read(tmp_path / f"task-{task}").done == task + 1
            graftune.load(MODELS["transformers-vit"].build(), tmp_path / f"task-{task}")
    record = sequence(tmp_path, task_aware=True).train(resume=True)
    assert adapter(tmp_path) == adapter(whole)
    assert record == TaskRecord.read(whole / "task-2")


def test_killed_in_a_process(whole: Path, tmp_path: Path) -> None:
    assert launch(killed_or_done, tmp_path, "move", 2) == [-signal.SIGKILL]
    assert [path.name for path in tmp_path.glob("task-*")] == ["task-0"]
    succeed(killed_or_done, tmp_path, None, 0)
    assert adapter(tmp_path) == adapter(whole)


class Unreadable(list):
    """Rows that end a run."""

    def __getitem__(self, index: Any) -> Any:
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda rows: [{**r, "pixel_values": r["pixel_values"] * np.nan} for r in rows], "finite"),
        (Unreadable, "the disk is gone"),
        (lambda rows: [{**row, "labels": row["labels"] + 4} for row in rows], r"label [67] is out"),
        (lambda rows: [{**row, "labels": 1} for row in rows], "label 1 is out of range"),
    ],
    ids=["not finite", "not there", "labels of a later task", "labels of an earlier task"],
)
def test_a_task_that_fails_leaves_the_one_before(
    broken: Any, error: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "task-0", tmp_path / "task-0")
    train = split()
    parts = (train.parts[0], broken(train.parts[1]), train.parts[2])
    with pytest.raises((FloatingPointError, OSError, ValueError), match=error):
        sequence(tmp_path, train=TaskSplit(train.order, parts)).train(resume=True)
    assert TaskRecord.read(tmp_path / "task-0").done == 1
    assert adapter(tmp_path, 0) == adapter(whole, 0)
    assert not (tmp_path / "task-1").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two tasks without regularizers."""
    folder = tmp_path_factory.mktemp("alone")
    sequence(folder, train=split(2), regularizers=[]).train()
    return folder


@pytest.mark.parametrize(
    "regularizers",
    [
        lambda: [ElasticWeightConsolidation(10.0)],
        lambda: [PreviousDistillation(1.0)],
        lambda: [PreviousDistillation(1.0, of="features"), L2ToStart(0.1), outliers()],
    ],
    ids=["ewc", "logits", "features, l2, outliers"],
)
def test_towards_the_previous_task(
    regularizers: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = split(2)
    trainer = sequence(tmp_path / "whole", train=train, regularizers=regularizers())
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    assert adapter(tmp_path / "whole", 1) != adapter(alone, 1)
    shutil.copytree(tmp_path / "whole" / "task-0", tmp_path / "cut" / "task-0")
    cut = sequence(tmp_path / "cut", train=train, regularizers=regularizers())
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 4 if len(regularizers()) == 3 else 2, stop)
        with pytest.raises(Interrupted):
            cut.train(resume=True)
    sequence(tmp_path / "cut", train=train, regularizers=regularizers()).train(resume=True)
    assert adapter(tmp_path / "cut", 1) == adapter(tmp_path / "whole", 1)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("coda_prompt", {"pool_size": 6, "tasks": 3, "prompt_blocks": [0]}),
        ("dual_prompt", {"tasks": 3, "general_blocks": [0], "expert_blocks": [1]}),
        ("l2p", {"pool_size": 4, "chosen": 2}),
        ("flora", {"r": 2}),
        ("lora", {}),
    ],
)
def test_any_adapter(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    config: Any = method
    if method == "lora":
        config = LoraConfig(target_modules="all-linear", r=2)
    model = adapted(config, **options)
    own = regularizers_of(model)
    record = sequence(
        tmp_path,
        model=model,
        train=split(2),
        regularizers=[*own, outliers()],
        arguments_=QUIET,
        outlier_epochs=1,
    ).train()
    assert record.done == 2


def test_timm_and_a_classifier_of_its_name(tmp_path: Path) -> None:
    model = adapted(model="timm-vit")
    trainer = sequence(tmp_path, model=model, head="head", train=split(2), arguments_=QUIET)
    assert trainer.train().done == 2


def test_one_task_more(whole: Path, tmp_path: Path) -> None:
    saved = whole / "task-2"
    before = TaskRecord.read(saved)
    order = before.order.then(["6", "7"])
    names = [str(number) for number in range(8)]
    new = [row for row in images(classes=8) if row["labels"] >= 6]
    parts = order.split(new, label="labels", names=names, first=3)
    model = graftune.load(MODELS["transformers-vit"].build(), saved, is_trainable=True)
    trainer = sequence(tmp_path, model=model, train=TaskSplit(order, tuple(parts)), task_aware=True)
    record = trainer.train(resume=saved)
    assert record.accuracies[:3] == before.accuracies
    assert [path.name for path in tmp_path.iterdir()] == ["task-3"]
    again = graftune.load(MODELS["transformers-vit"].build(), tmp_path / "task-3")
    assert again.get_base_model().classifier.out_features == 8


def test_a_head_of_other_classes(whole: Path, tmp_path: Path) -> None:
    before = adapter(whole)
    other = split(seed=1)
    assert other.order.tasks != split().order.tasks
    with pytest.raises(ClassListError, match=r"has the classes .* in 3 tasks"):
        sequence(tmp_path, train=other).train(resume=whole / "task-2")
    with pytest.raises(ClassListError):
        sequence(whole, train=other).train(resume=True)
    assert adapter(whole) == before
    flora = adapted("flora", r=2)
    with pytest.raises(ValueError, match="is of the method 'ONE_PROMPT'"):
        sequence(tmp_path, model=flora).train(resume=whole / "task-2")
    with pytest.raises(FileNotFoundError, match="not the folder of a finished task"):
        sequence(tmp_path).train(resume=tmp_path)


def test_nothing_is_written_over(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"has finished tasks, the last of them in task-2"):
        sequence(whole).train()
    assert sequence(whole, task_aware=True).train(resume=True).done == 3


def test_what_is_said_before_the_first_task(tmp_path: Path) -> None:
    train = split()
    with pytest.raises(TypeError, match="has no adapter"):
        sequence(tmp_path, model=MODELS["transformers-vit"].build())
    with pytest.raises(ValueError, match=r"'clasifier' is not there. Did you mean 'classifier'"):
        sequence(tmp_path, head="clasifier")
    bare = graftune.wrap(MODELS["transformers-vit"].build(), "flora", r=2)
    with pytest.raises(ValueError, match="not trained with the adapter"):
        sequence(tmp_path, model=bare, regularizers=[FrozenDistillation()])
    with pytest.raises(ValueError, match="3 parts to train and 2 to measure"):
        sequence(tmp_path, test=list(train.parts[:2]))
    with pytest.raises(ValueError, match="task 1 has no images to measure"):
        sequence(tmp_path, test=[train.parts[0], [], train.parts[2]])
    with pytest.raises(ValueError, match="outlier_epochs is 0"):
        sequence(tmp_path, outlier_epochs=0)
    pool = adapted("coda_prompt", pool_size=4, tasks=2, prompt_blocks=[0])
    with pytest.raises(ValueError, match="task"):
        sequence(tmp_path, model=pool)
    gone = TaskSplit(train.order, (train.parts[0], None, train.parts[2]))
    with pytest.raises(ValueError, match="task 1 has no images and is still to be learned"):
        sequence(tmp_path, train=gone).train()
    assert not list(tmp_path.iterdir())
