"""Regularizers in the trainer: their terms, gradients and hooks, and the runs they leave equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainingArguments

import graftune
from graftune.adapters.base.frozen import frozen_base
from graftune.adapters.regularizers import Gradients, Need, Regularizer, Run, Step
from support.clip import COLOURS, clip, colours
from support.models import MODELS


@dataclass
class Recorder(Regularizer):
    """Writes down what it is called with; wants everything there is to want."""

    name: ClassVar[str] = "test_recorder"
    calls: list[str] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset(Need)

    def start(self, run: Run) -> None:
        self.calls.append(f"start {run.steps} {run.epochs}")

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        assert step.frozen is not None
        assert not step.frozen["logits"].requires_grad
        assert set(step.outputs["features"]) == set(step.frozen["features"])
        return {}

    def separate_terms(self, step: Step) -> Mapping[str, Tensor]:
        return {"logits": step.outputs["logits"].square().mean()}

    def transform_gradients(self, gradients: Gradients) -> None:
        own = gradients.of_terms["logits"]
        self.norm = sum(float(g.norm()) for g in own if g is not None)
        assert [p.grad is not None for p in gradients.parameters] == [True] * len(own)
        self.calls.append("gradients")

    def step_end(self, run: Run) -> None:
        self.calls.append("step")

    def epoch_end(self, run: Run, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def end(self, run: Run) -> None:
        self.calls.append("end")


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
    }
    return TrainingArguments(str(folder), **{**given, **overrides})


def trainer(
    folder: Path,
    regularizers: list[Any] | None = None,
    method: Any = "flora",
    **overrides: Any,
) -> graftune.Trainer:
    base, tokenizer = clip()
    torch.manual_seed(1)
    options = {"r": 4} if isinstance(method, str) else {}
    return graftune.Trainer(
        graftune.wrap(base, method, **options),
        arguments(folder, **overrides),
        objective=graftune.ClassNameClassifier(list(COLOURS), tokenizer),
        train_dataset=colours(16),
        regularizers=regularizers,
    )


def weights(run: graftune.Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def test_every_hook_is_called_in_its_place(tmp_path: Path) -> None:
    recorder = Recorder()
    run = trainer(tmp_path, [recorder], max_steps=-1, num_train_epochs=2)
    run.train()
    step = ["gradients", "step"]
    assert recorder.calls == ["start 4 2", *step, *step, "epoch 1", *step, *step, "epoch 2", "end"]
    assert recorder.norm > 0


def test_the_frozen_forward_is_done_once_for_all(tmp_path: Path) -> None:
    run = trainer(tmp_path, [Recorder(), graftune.FrozenDistillation()], max_steps=3)
    forwards = {True: 0, False: 0}
    # The frozen model's class features are computed once a run: what it sees are the pictures.
    run.model.get_base_model().vision_model.register_forward_hook(
        lambda *_: forwards.__setitem__(
            torch.is_grad_enabled(), forwards[torch.is_grad_enabled()] + 1
        )
    )
    run.train()
    assert forwards == {True: 3, False: 3}


@pytest.mark.parametrize("method", ["flora", LoraConfig(r=4)], ids=["flora", "lora"])
@pytest.mark.parametrize(
    "chosen",
    [
        graftune.FrozenDistillation(2.0),
        graftune.FrozenDistillation(5.0, of="features"),
        graftune.L2ToStart(0.5),
        graftune.L2ToStart(0.5, of="merged"),
    ],
    ids=lambda regularizer: f"{regularizer.name}-{regularizer.of}",
)
def test_the_adapted_model_stays_nearer_to_the_frozen_one(
    method: Any, chosen: Regularizer, tmp_path: Path
) -> None:
    distances = []
    pixels = torch.stack([row["pixel_values"] for row in colours(16)])
    for regularizers in ([], [chosen]):
        run = trainer(tmp_path, regularizers, method, max_steps=8)
        run.train()
        model = run.model.eval()
        with torch.no_grad():
            adapted = run.objective(model, pixels)["logits"].log_softmax(-1)
        with frozen_base(model):
            frozen = run.objective(model, pixels)["logits"].log_softmax(-1)
        distances.append((adapted - frozen).norm().item())
    assert distances[1] < distances[0]


def test_terms_are_logged_and_add_up(tmp_path: Path) -> None:
    run = trainer(tmp_path, [graftune.FrozenDistillation(2.0), graftune.L2ToStart(0.1)])
    run.train()
    rows = [row for row in run.state.log_history if "task_loss" in row]
    assert len(rows) == 4
    for row in rows:
        parts = row["task_loss"] + row["frozen_distillation"] + row["l2_to_start"]
        assert row["loss"] == pytest.approx(parts, abs=2e-3)


def test_the_config_records_what_the_trainer_uses(tmp_path: Path) -> None:
    base, tokenizer = clip()
    chosen = [graftune.L2ToStart(0.25)]
    run = graftune.Trainer(
        graftune.wrap(base, "flora", r=2, regularizers=chosen),
        arguments(tmp_path),
        objective=graftune.ClassNameClassifier(list(COLOURS), tokenizer),
        train_dataset=colours(8),
    )
    assert run.regularization.regularizers == chosen


@pytest.mark.parametrize("objective", [True, False])
def test_accumulated_batches_equal_one_large_batch(objective: bool, tmp_path: Path) -> None:
    ends = []
    for batch, accumulated in ((8, 1), (4, 2)):
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "max_steps": 3,
        }
        chosen = [graftune.FrozenDistillation(2.0), graftune.L2ToStart(0.1)]
        if objective:
            run = trainer(tmp_path, chosen, **settings)
        else:
            case = MODELS["transformers-llama"]
            torch.manual_seed(1)
            rows = [
                {"input_ids": ids, "labels": ids.where(torch.rand(7) > 0.3, -100)}
                for ids in case.batch(16)["input_ids"]
            ]
            model = graftune.wrap(case.build(), "flora", r=2)
            run = graftune.Trainer(
                model, arguments(tmp_path, **settings), train_dataset=rows, regularizers=chosen
            )
        run.train()
        ends.append(weights(run))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_ends_bit_for_bit_with_regularizer_state(stop: int, tmp_path: Path) -> None:
    def run(folder: Path) -> graftune.Trainer:
        chosen = [graftune.L2ToStart(0.1), graftune.FrozenDistillation()]
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
        return trainer(folder, chosen, **saving)

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_the_end_of_an_epoch_is_not_lost_when_resuming_from_its_last_step(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    trainer(tmp_path, [Recorder()], **saving).train()
    recorder = Recorder()
    run = trainer(tmp_path, [recorder], **saving)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # Checkpoint 2 is of the first epoch's last step, before the epoch was over.
    step = ["gradients", "step"]
    assert recorder.calls == ["start 4 2", "epoch 1", *step, *step, "epoch 2", "end"]


def test_a_checkpoint_of_other_regularizers_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, [graftune.L2ToStart()], **saving).train()
    other = trainer(tmp_path, [graftune.FrozenDistillation()], **saving)
    with pytest.raises(ValueError, match=r"'l2_to_start', the run has 'frozen_distillation'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(tmp_path / "plain", [], **saving).train()
    with pytest.raises(ValueError, match="was written without regularizers"):
        other.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def test_each_model_of_model_init_is_regularized(tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        torch.manual_seed(1)
        made.append(graftune.wrap(clip()[0], "flora", r=2))
        return made[-1]

    run = graftune.Trainer(
        args=arguments(tmp_path, max_steps=2),
        model_init=make,
        objective=graftune.ClassNameClassifier(list(COLOURS), clip()[1]),
        train_dataset=colours(16),
        regularizers=[graftune.L2ToStart(10.0)],
    )
    run.train()
    run.train()
    assert run.model is made[-1]
    assert run.regularization.model is made[-1]
    rows = [row["l2_to_start"] for row in run.state.log_history if "l2_to_start" in row]
    assert rows[0] == 0 < rows[1]
    with pytest.raises(ValueError, match="hyperparameter_search keeps its score"):
        run.hyperparameter_search()


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than one regularizer of the name 'l2_to_start'"):
        trainer(tmp_path, [graftune.L2ToStart(), graftune.L2ToStart()])


def test_evaluation_has_no_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, [graftune.FrozenDistillation(100.0)])
    plain = trainer(tmp_path, [])
    rows: Any = colours(8, seed=1)
    assert run.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]


def test_a_regularizer_the_model_cannot_have_is_refused_at_once(tmp_path: Path) -> None:
    from peft import OFTConfig

    with pytest.raises(TypeError, match="does not add to the weight"):
        trainer(tmp_path, [graftune.L2ToStart(of="merged")], OFTConfig(oft_block_size=4))
