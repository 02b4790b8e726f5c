"""TRL's SFTTrainer with regularizers, whose default loss never computes logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import graftune
from graftune.adapters.base.frozen import frozen_base
from graftune.integrations.training import outputs
from support.text import byte_tokenizer
from support.training import Opposing, losses, weights


class Regularized(graftune.TrainerMixin, SFTTrainer):
    """As the mixin's documentation has it."""


TEXTS = [f"the capital number {number} is Paris" for number in range(16)]
PAIRS = [{"prompt": "the capital of ", "completion": f"France {n}" * (1 + n % 3)} for n in range(8)]
CHOSEN = [graftune.FrozenDistillation(2.0), graftune.L2ToStart(0.1)]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def trainer(
    folder: Path,
    regularizers: list[Any],
    method: Any = "flora",
    data: Any = None,
    cls: Any = Regularized,
    **overrides: Any,
) -> Any:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(pad_token="<|end|>")
    base = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(tokenizer)))
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_length": 32,
        "bf16": False,  # which TRL sets where it is not said
    }
    return cls(
        graftune.wrap(base, method, **({"r": 4} if method == "flora" else {})),
        args=SFTConfig(str(folder), **{**given, **overrides}),
        train_dataset=data or Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        **({"regularizers": regularizers} if cls is Regularized else {}),
    )


def logged(run: Any, *names: str) -> Tensor:
    rows = [row for row in run.state.log_history if "loss" in row]
    return torch.tensor([[row[name] for name in names] for row in rows])


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "completions": {"data": Dataset.from_list(PAIRS)},
    "packed": {"packing": True, "max_length": 16},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_loss_and_the_metrics_stay_trls(option: str, tmp_path: Path) -> None:
    # A weight of nothing: the logits are computed, and change nothing.
    run = trainer(tmp_path, [graftune.FrozenDistillation(0.0)], **OPTIONS[option])
    plain = trainer(tmp_path, [], cls=SFTTrainer, **OPTIONS[option])
    run.train()
    plain.train()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    torch.testing.assert_close(logged(run, *names), logged(plain, *names), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["flora", LoraConfig(r=4)], ids=["flora", "lora"])
def test_terms_are_logged_and_keep_the_model_near(method: Any, tmp_path: Path) -> None:
    distances = []
    for chosen in ([], CHOSEN):
        run = trainer(
            tmp_path, chosen, method, max_steps=8, optim="adamw_torch", learning_rate=0.01
        )
        run.train()
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            adapted = run.model.eval()(ids).logits.log_softmax(-1)
        with frozen_base(run.model):
            frozen = run.model(ids).logits.log_softmax(-1)
        distances.append((adapted - frozen).norm().item())
    assert distances[1] < distances[0]
    parts = logged(run, "task_loss", "frozen_distillation", "l2_to_start")
    assert (parts[1:] > 0).all()
    torch.testing.assert_close(parts.sum(1, keepdim=True), logged(run, "loss"), rtol=0, atol=1e-4)


def test_one_forward_pass_does_for_loss_and_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, CHOSEN, max_steps=2, gradient_checkpointing=False)
    forwards = {True: 0, False: 0}
    run.model.get_base_model().model.register_forward_hook(
        lambda *_: forwards.__setitem__(
            torch.is_grad_enabled(), forwards[torch.is_grad_enabled()] + 1
        )
    )
    run.train()
    assert forwards == {True: 2, False: 2}


def test_terms_of_weights_leave_trls_loss_without_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(outputs, "per_token", never)
    run = trainer(tmp_path, [graftune.L2ToStart(0.1)], max_steps=2)
    run.train()
    assert (logged(run, "l2_to_start")[1:] > 0).all()


def test_features_and_separate_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, [graftune.FrozenDistillation(2.0, of="features"), Opposing()])
    run.train()
    assert (logged(run, "frozen_distillation_hidden")[1:] > 0).all()


def test_a_resumed_run_ends_the_same_and_the_adapter_is_all_that_is_saved(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", CHOSEN, **saving)
    whole.train()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "kept")
    resumed = trainer(tmp_path / "whole", CHOSEN, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())
    resumed.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "whole" / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert not names & {"training_args.bin", "model.safetensors", "pytorch_model.bin"}


def test_a_model_that_returns_no_logits_is_told_what_to_set(tmp_path: Path) -> None:
    run = trainer(tmp_path, CHOSEN)
    base = run.model.get_base_model()
    base.register_forward_hook(lambda module, args, output: {**output, "logits": None})
    with pytest.raises(ValueError, match=r"logits.*use_liger_kernel=False"):
        run.train()
