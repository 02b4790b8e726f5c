"""Several methods on one model in the trainer: jointly, one after the other, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import graftune
from graftune import DeepPromptConfig, MaskTuningConfig
from graftune.adapters.mask_tuning import is_pending
from graftune.integrations.training import regularizers_of
from support.clip import COLOURS, clip, colours
from support.processes import launch, succeed
from support.training import arguments, colour_run, go_on, weights

PROMPTS = DeepPromptConfig(
    num_tokens_text=1, num_tokens_vision=1, depth_text=1, depth_vision=1, init_text=None
)


def trainer(model: Any, folder: Path, **overrides: Any) -> graftune.Trainer:
    options = {k: overrides.pop(k) for k in ("regularizers",) if k in overrides}
    return graftune.Trainer(
        model,
        arguments(folder, **{"max_steps": 3, **overrides}),
        objective=graftune.ClassNameClassifier(list(COLOURS), clip()[1]),
        train_dataset=colours(16),
        **options,
    )


def part_of(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items() if f".{prefix}" in k}


def logits(model: Any) -> torch.Tensor:
    pixels = torch.stack([row["pixel_values"] for row in colours(4)])
    objective = graftune.ClassNameClassifier(list(COLOURS), clip()[1])
    with torch.no_grad():
        return objective(model.eval(), pixels)["logits"]


def test_the_regularizers_of_all_recipes_are_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = graftune.wrap(
        clip()[0], ["promptsrc", "mask_tuning"], num_tokens_text=1, init_text=None, depth_text=1,
        num_tokens_vision=1, depth_vision=1
    )  # fmt: skip
    names = [each.name for each in regularizers_of(model)]
    assert names == [
        "self_regulation",
        "gaussian_averaging",
        "gradient_dropout",
        "mask_norm",
    ]
    before = {p: part_of(model, p) for p in ("deep_prompt_", "mask_tuning_")}
    run = trainer(model, tmp_path, max_steps=-1, num_train_epochs=1)
    run.train()
    logged = run.state.log_history[0]
    assert {"task_loss", "self_regulation_text", "mask_norm"} <= set(logged)
    for prefix, tensors in before.items():
        assert any((part_of(model, prefix)[k] != t).any() for k, t in tensors.items())
    model.save_pretrained(tmp_path / "adapter")
    loaded = graftune.load(clip()[0], tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert [each.name for each in regularizers_of(loaded)] == names


def test_one_after_the_other_the_first_frozen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = graftune.wrap(clip()[0], LoraConfig(r=2), regularizers=[graftune.L2ToStart(0.1)])
    trainer(first, tmp_path / "first").train()
    first.save_pretrained(tmp_path / "lora")

    model = graftune.load(clip()[0], tmp_path / "lora")  # frozen, as it is not asked to be trained
    before = logits(model)
    again = graftune.wrap(model, "mask_tuning", regularizers=[graftune.MaskNorm(0.01)])
    assert again is model
    assert model.peft_config["default"].methods == ["lora", "mask_tuning"]
    assert [each.name for each in regularizers_of(model)] == ["l2_to_start", "mask_norm"]
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(clip()[0]))
    kept = part_of(model, "lora_")
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(
        part_of(model, "mask_tuning_")
    )
    trainer(model, tmp_path / "second", learning_rate=5e-3).train()
    assert all(torch.equal(t, kept[k]) for k, t in part_of(model, "lora_").items())
    assert not torch.allclose(logits(model), before)
    model.save_pretrained(tmp_path / "both")
    loaded = graftune.load(clip()[0], tmp_path / "both", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not [k for k, p in loaded.named_parameters() if p.requires_grad and "lora" in k]


def test_one_after_the_other_both_trained(tmp_path: Path) -> None:
    model = graftune.wrap(clip()[0], "flora", r=2)
    graftune.wrap(model, [LoraConfig(r=2), "mask_tuning"], regularizers=[])
    assert model.peft_config["default"].methods == ["flora", "lora", "mask_tuning"]
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {k for k, _ in model.named_parameters() if "default" in k}
    with pytest.raises(ValueError, match="'mask_tuning' is there more than once"):
        graftune.wrap(model, MaskTuningConfig())
    with pytest.raises(ValueError, match=r"joins the adapter that is there, 'default'"):
        graftune.wrap(model, PROMPTS, adapter_name="other")


def test_a_refused_method_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    model = graftune.wrap(clip()[0], LoraConfig(r=2))
    before = [(k, id(m)) for k, m in model.named_modules()], model.peft_type, logits(model)
    for refused in (LoraConfig(r=2), MaskTuningConfig(target_modules=["nowhere"])):
        methods = [PROMPTS, refused]
        with pytest.raises(ValueError, match=r"more than once|not found in the base model"):
            graftune.wrap(model, methods)
        assert [(k, id(m)) for k, m in model.named_modules()] == before[0]
        assert model.peft_type == before[1]
        assert list(model.peft_config["default"].to_dict()) == list(LoraConfig().to_dict())
    assert torch.equal(logits(model), before[2])
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        graftune.wrap(model, "mask_tuning")


def test_masks_of_a_share_are_selected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    methods = [LoraConfig(r=2), "mask_tuning"]
    model = graftune.wrap(clip()[0], methods, fraction=0.1, regularizers=[])
    assert is_pending(model, "default")
    trainer(model, tmp_path).train()
    assert not is_pending(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(graftune.load(clip()[0], tmp_path / "adapter")), logits(model))


def test_a_resumed_run_ends_bit_for_bit_and_loads_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "stack",
        "regularizers": [graftune.GradientDropout(0.5), graftune.MaskNorm(0.01)],
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
    }
    whole = colour_run(tmp_path / "whole", **options)
    whole.train()
    resumed = colour_run(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name
    best = colour_run(
        tmp_path / "best",
        **options,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    best.train()
    saved = Path(str(best.state.best_model_checkpoint))
    again = colour_run(tmp_path / "again", **options).model
    again.load_adapter(saved, "default")
    for name, weight in weights(best).items():
        assert torch.equal(dict(again.named_parameters())[name], weight), name


def test_killed_and_resumed(tmp_path: Path) -> None:
    options = {"method": "stack", "rows": 12, "per_device_train_batch_size": 4, "max_steps": 4,
               "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    succeed(go_on, tmp_path / "whole", None, options)
    for kill in (("gradient", 2, 0), ("after save_model", 3, 0)):
        assert launch(go_on, tmp_path / "killed", kill, options)[0] < 0
    succeed(go_on, tmp_path / "killed", None, options)
    ends = [(tmp_path / n / "final" / "adapter_model.safetensors").read_bytes()
            for n in ("whole", "killed")]  # fmt: skip
    assert ends[0] == ends[1]
