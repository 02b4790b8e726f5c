"""Every objective trains in the trainer: accumulation, evaluation, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments

import graftune
from graftune import CausalLM, Denoising, ImageClassifier, Trainer
from support.models import MODELS


def rows(name: str) -> list[dict[str, Any]]:
    """Twelve examples; sentences count differently many tokens, the first token of some not."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(12):
        if name == "diffusers-unet":
            drawn = [
                torch.randn(shape, generator=generator) for shape in [(4, 8, 8)] * 2 + [(5, 16)]
            ]
            example = dict(zip(("sample", "noise", "encoder_hidden_states"), drawn, strict=True))
            example["timesteps"] = torch.tensor(80 * i)
        elif name == "timm-vit":
            pixels = torch.randn(3, 32, 32, generator=generator)
            example = {"pixel_values": pixels, "labels": i % 5 if i % 3 else -100}
        else:
            tokens = torch.randint(1, 60, (8,), generator=generator)
            labels = tokens.masked_fill(torch.arange(8) < i // 2, -100)
            example = {"input_ids": tokens, "labels": labels}
        examples.append(example)
    return examples


OBJECTIVES = {
    "transformers-llama": CausalLM,
    "transformers-gpt2": CausalLM,
    "timm-vit": ImageClassifier,
    "diffusers-unet": lambda: Denoising(DDPMScheduler()),
}
EACH = pytest.mark.parametrize("name", OBJECTIVES)


def adapted(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return graftune.wrap(model, LoraConfig(r=4, init_lora_weights=False))


def trainer(folder: Path, name: str, **overrides: Any) -> Trainer:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 5,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
    }
    return Trainer(
        adapted(name),
        TrainingArguments(**{**given, **overrides}),
        objective=OBJECTIVES[name](),
        train_dataset=rows(name),
        eval_dataset=rows(name),
    )


@EACH
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, name: str) -> None:
    large = trainer(tmp_path, name)
    large.train()
    # The last of an epoch's batches is smaller than the others.
    small = trainer(tmp_path, name, per_device_train_batch_size=5, gradient_accumulation_steps=3)
    small.train()
    for key in ("loss", "grad_norm"):
        expected = [entry[key] for entry in large.state.log_history if key in entry]
        found = [entry[key] for entry in small.state.log_history if key in entry]
        assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", ["transformers-llama", "transformers-gpt2"])
def test_evaluation_is_over_all_tokens(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path, name)
    found = run.evaluate()
    batch = run.data_collator(rows(name))
    with torch.no_grad():
        output = CausalLM()(run.model, **batch)
    assert found["eval_loss"] == pytest.approx(output["loss"].item(), rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(output["loss"].item()), rel=1e-5)
    right = output["logits"][:, :-1].argmax(-1) == batch["labels"][:, 1:]
    accuracy = right[output["mask"][:, :-1]].float().mean().item()
    assert found["eval_token_accuracy"] == pytest.approx(accuracy)


def test_logits_are_predicted_where_there_are_no_labels(tmp_path: Path) -> None:
    run = trainer(tmp_path, "transformers-llama")
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows("transformers-llama")]
    assert run.predict(unlabelled).predictions.shape == (12, 8, 64)


def test_the_loss_of_denoising_is_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path, "diffusers-unet", per_device_eval_batch_size=4)
    with torch.no_grad():
        expected = run.objective(run.model, **run.data_collator(rows("diffusers-unet")))["loss"]
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_undrawn_noise_follows_the_seed(tmp_path: Path) -> None:
    histories = []
    for seed in (1, 1, 2):
        run = trainer(tmp_path, "diffusers-unet", seed=seed, data_seed=0)
        run.train_dataset = [
            {key: row[key] for key in ("sample", "encoder_hidden_states")}
            for row in rows("diffusers-unet")
        ]
        run.train()
        histories.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert histories[0] == histories[1] != histories[2]
