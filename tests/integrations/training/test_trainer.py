"""The trainer on a small CLIP: it learns, saves the adapter alone, and resumes exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from graftune.integrations.objectives.class_names import ClassNameClassifier
from graftune.integrations.training import Trainer
from support.clip import COLOURS, clip, colours

LINEARS = ["q_proj", "v_proj", "fc1", "fc2"]


class Rows(Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**given, **overrides})


def adapted(method: str = "lora", dropout: float = 0.0) -> tuple[nn.Module, ClassNameClassifier]:
    model, tokenizer = clip()
    torch.manual_seed(1)
    if method == "lora":
        config: Any = LoraConfig(r=4, target_modules=LINEARS, lora_dropout=dropout)
    else:
        graftune = pytest.importorskip("graftune.adapters.flora")
        config = graftune.FloraConfig(r=4, target_modules=LINEARS, dropout=dropout)
    return get_peft_model(model, config), ClassNameClassifier(list(COLOURS), tokenizer)


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


def trainer(folder: Path, method: str = "lora", dropout: float = 0.0, **overrides: Any) -> Trainer:
    model, objective = adapted(method, dropout)
    data = Rows(colours(40))
    return Trainer(
        model,
        arguments(folder, **overrides),
        objective=objective,
        train_dataset=data,
        eval_dataset=Rows(colours(20, seed=1)),
    )


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_it_learns_and_reports(tmp_path: Path, method: str) -> None:
    run = trainer(tmp_path, method, max_steps=25)
    before = {k: p.clone() for k, p in run.model.named_parameters() if not p.requires_grad}
    zero_shot = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.7 * zero_shot["eval_loss"]
    assert after["eval_accuracy"] > zero_shot["eval_accuracy"]
    assert after["eval_balanced_accuracy"] == pytest.approx(after["eval_accuracy"])
    for name, parameter in run.model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for p in run.model.parameters() if p.requires_grad
    )
    assert all("lora_" in name for name in tensors)
    assert not [
        f.name for f in folder.iterdir() if f.name in ("model.safetensors", "training_args.bin")
    ]
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 1e-2


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, method: str) -> None:
    settings = {"dropout": 0.2, "save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole = trainer(tmp_path, method, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = adapter(whole.model)
    assert expected.keys() == adapter(resumed.model).keys()
    assert all(torch.equal(expected[k], v) for k, v in adapter(resumed.model).items())


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    large = trainer(tmp_path, per_device_train_batch_size=10, max_steps=5)
    large.train()
    small = trainer(
        tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=5
    )
    small.train()
    for key in ("loss", "grad_norm"):
        expected = [entry[key] for entry in large.state.log_history if key in entry]
        found = [entry[key] for entry in small.state.log_history if key in entry]
        assert found == pytest.approx(expected, rel=1e-4)


def test_pictures_without_labels_are_predicted(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    rows = [{"pixel_values": row["pixel_values"]} for row in colours(10)]
    with_labels = run.predict(Rows(colours(10)))
    without = run.predict(Rows(rows))
    assert without.predictions.shape == (10, 4)
    assert (without.predictions == with_labels.predictions).all()


def test_other_classes_at_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.objective = run.objective.with_class_names(["red", "green", "blue", "grey", "light"])
    assert run.predict(Rows(colours(6))).predictions.shape == (6, 5)


def test_the_loss_calls_the_wrapped_model_once(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(run.model)
        calls: list[list[str]] = []
        wrapped.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(sorted(kwargs)), with_kwargs=True
        )
        run.compute_loss(wrapped, run.data_collator(colours(4))).backward()
    finally:
        distributed.destroy_process_group()
    assert calls == [["attention_mask", "input_ids", "pixel_values"]]
    assert all(
        parameter.grad is not None
        for parameter in run.model.parameters()
        if parameter.requires_grad
    )


def test_bf16_autocast_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=2)
    run.train()
    assert {p.dtype for p in adapter(run.model).values()} == {torch.float32}
    assert torch.isfinite(torch.tensor(run.state.log_history[0]["loss"]))


def test_torch_compile(tmp_path: Path) -> None:
    run = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    plain = trainer(tmp_path, max_steps=2)
    run.train()
    plain.train()
    assert run.state.log_history[1]["loss"] == pytest.approx(
        plain.state.log_history[1]["loss"], rel=1e-4
    )


def test_a_loss_that_is_not_finite_names_the_step_and_the_cause(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    for row in run.train_dataset.rows:
        row["pixel_values"] = row["pixel_values"] * float("nan")
    with pytest.raises(FloatingPointError, match=r"nan at step 1 of 8.*pixel_values is not finite"):
        run.train()


def test_a_loss_that_diverges_names_the_learning_rate(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                for parameter in adapter_parameters:
                    parameter.data.fill_(float("nan"))

    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    adapter_parameters = [p for p in run.model.parameters() if p.requires_grad]
    run.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"at step 4 of 8.*lower learning_rate"):
        run.train()
    good = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in good.values())


class Normalised(nn.Module):
    """A frozen batch normalisation with a dropout, under an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.first(x))))


class CrossEntropy(nn.Module):
    def forward(self, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict:
        logits = model(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_running_statistics_of_the_base_model_stay(tmp_path: Path) -> None:
    model = get_peft_model(Normalised(), LoraConfig(target_modules=["first", "head"]))
    data = Rows([{"x": torch.randn(6) + 5, "labels": i % 3, "note": "text"} for i in range(16)])
    run = Trainer(model, arguments(tmp_path), objective=CrossEntropy(), train_dataset=data)
    run.train()
    norm = model.get_base_model().norm
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert model.get_base_model().drop.training


def test_without_an_objective_the_loss_is_the_models_own(tmp_path: Path) -> None:
    from support.models import MODELS

    model = get_peft_model(
        MODELS["transformers-llama"].build(), LoraConfig(target_modules=["q_proj"])
    )
    rows = [{"input_ids": list(range(5)), "labels": list(range(5))} for _ in range(8)]
    run = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=Rows(rows))
    run.train()
    assert run.state.log_history[0]["loss"] > 0


def test_nothing_to_train_is_named(tmp_path: Path) -> None:
    model, objective = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        Trainer(model, arguments(tmp_path), objective=objective)


def test_an_objective_with_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has trainable weights"):
        Trainer(adapted()[0], arguments(tmp_path), objective=nn.Linear(2, 2))


def losses(tmp_path: Path, launch: list[str], batch: int) -> list[float]:
    """Run this file as a training script and return the losses it wrote."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*launch, __file__, str(tmp_path), str(batch)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((tmp_path / "losses.json").read_text())


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    one = losses(tmp_path, [sys.executable], batch=8)
    two = losses(tmp_path, [*torchrun, "--nproc_per_node=2"], batch=4)
    assert two == pytest.approx(one, rel=1e-4)


if __name__ == "__main__":
    target, size = Path(sys.argv[1]), int(sys.argv[2])
    script = trainer(target, per_device_train_batch_size=size, max_steps=6)
    script.train()
    metrics = script.evaluate()
    if script.is_world_process_zero():
        history = [entry["loss"] for entry in script.state.log_history if "loss" in entry]
        (target / "losses.json").write_text(json.dumps([*history, metrics["eval_accuracy"]]))
