"""The loss is transformers' own, and metrics need no logits of a whole data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from graftune import CausalLM
from support.models import MODELS

MODELS_OF_TEXT = ["transformers-llama", "transformers-gpt2"]


def batch(lengths: tuple[int, ...] = (7, 4, 2)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 60, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS_OF_TEXT)
@pytest.mark.parametrize("items", [None, 20])
def test_the_loss_is_transformers_own(name: str, items: int | None) -> None:
    model = MODELS[name].build()
    given = {} if items is None else {"num_items_in_batch": items}
    with torch.no_grad():
        own = model(**batch(), **given)
        output = CausalLM()(model, **batch(), **given)
    torch.testing.assert_close(output["loss"], own.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output["logits"], own.logits)


def test_the_loss_of_half_precision_is_computed_in_float32() -> None:
    model = MODELS["transformers-llama"].build().to(torch.bfloat16)
    output = CausalLM()(model, **batch())
    assert output["logits"].dtype == torch.bfloat16
    targets = F.pad(batch()["labels"][:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(output["logits"].float().flatten(0, 1), targets.flatten())
    assert output["loss"].dtype == torch.float32
    torch.testing.assert_close(output["loss"], expected)


@pytest.mark.parametrize("name", MODELS_OF_TEXT)
def test_features_are_the_last_hidden_state(name: str) -> None:
    model = MODELS[name].build()
    with torch.no_grad():
        output = CausalLM()(model, **batch(), features=True)
        own = model(**batch(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(output["features"]["hidden"], own)


def test_tokens_of_prompt_tuning_are_cut() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(MODELS["transformers-llama"].build(), config).eval()
    own = model(**batch())
    output = CausalLM()(model, **batch(), features=True)
    assert own.logits.shape[1] == 10
    assert output["logits"].shape[:2] == output["mask"].shape == (3, 7)
    assert output["features"]["hidden"].shape == (3, 7, 32)
    torch.testing.assert_close(output["logits"], own.logits[:, 3:])
    # The library's loss has the prediction of the first token too, from the last virtual one.
    total = F.cross_entropy(own.logits[:, 2], batch()["labels"][:, 0], reduction="sum")
    items = CausalLM().items(batch())
    torch.testing.assert_close(output["loss"] * items + total, own.loss * (items + 3))
    output["loss"].backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.any()
    with torch.no_grad(), model.disable_adapter():
        frozen = CausalLM()(model, **batch())["logits"]
    assert frozen.shape == output["logits"].shape


def test_regularizers_compare_tokens_with_labels_or_those_without() -> None:
    model = MODELS["transformers-llama"].build()
    given = batch()
    given["labels"][:, :3] = -100
    labelled = CausalLM()(model, **given)
    others = CausalLM(compared="unlabelled")(model, **given)
    torch.testing.assert_close(others["loss"], labelled["loss"])
    tokens = given["attention_mask"].bool()
    assert torch.equal(labelled["mask"] | others["mask"], tokens)
    assert not (labelled["mask"] & others["mask"]).any()
    assert torch.equal(
        CausalLM(compared="unlabelled")(model, **_without_mask(given))["mask"][0], others["mask"][0]
    )
    with pytest.raises(ValueError, match="'labelled' or 'unlabelled', got 'all'"):
        CausalLM(compared="all")


def _without_mask(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "attention_mask"}


def test_metrics_are_those_of_all_tokens_together() -> None:
    model, objective = MODELS["transformers-llama"].build(), CausalLM()
    batches = [batch(), batch((3, 5)), batch((2,))]
    kept, logits, targets = [], [], []
    with torch.no_grad():
        for given in batches:
            output = objective(model, **given)
            kept.append(objective.preprocess_logits_for_metrics(output["logits"], given["labels"]))
            logits.append(output["logits"][output["mask"]])
            targets.append(given["labels"][:, 1:][output["mask"][:, :-1]])
    assert [tuple(rows.shape) for rows in kept] == [(3, 3), (2, 3), (1, 3)]
    found = objective.metrics(torch.cat(kept).numpy(), np.empty(0))
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    right = (torch.cat(logits).argmax(-1) == torch.cat(targets)).float().mean().item()
    assert found == pytest.approx(
        {"loss": loss, "perplexity": np.exp(loss), "token_accuracy": right}
    )


def test_metrics_keep_the_precision_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, dtype=torch.float64, generator=generator)
    labels = torch.randint(9, (2, 5), generator=generator)
    rows = CausalLM().preprocess_logits_for_metrics(logits, labels)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(rows[:, 0], losses.sum(1), rtol=1e-14, atol=0)


def test_metrics_in_transformers_trainer(tmp_path: Any) -> None:
    model, objective = MODELS["transformers-llama"].build(), CausalLM()
    lengths = (7, 4, 2, 5, 6)
    rows = [
        {key: value[i, : lengths[i]].tolist() for key, value in batch(lengths).items()}
        for i in range(5)
    ]

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["labels"]) for example in examples)
        padding = {"labels": -100}
        return {
            key: torch.tensor(
                [e[key] + [padding.get(key, 0)] * (longest - len(e[key])) for e in examples]
            )
            for key in examples[0]
        }

    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to="none"
        ),
        data_collator=collate,
        eval_dataset=rows,
        compute_metrics=lambda p: objective.metrics(p.predictions, p.label_ids),
        preprocess_logits_for_metrics=objective.preprocess_logits_for_metrics,
    )
    found = trainer.evaluate()
    with torch.no_grad():
        expected = objective(model, **collate(rows))["loss"].item()
    assert found["eval_loss"] == pytest.approx(expected)
    assert found["eval_perplexity"] == pytest.approx(np.exp(expected))


def test_metrics_of_nothing() -> None:
    found = CausalLM().metrics(np.zeros((2, 3), np.float32), np.empty(0))
    assert all(np.isnan(value) for value in found.values())


def test_metrics_of_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7, 64\) instead of.*preprocess_logits_for_metrics"):
        CausalLM().metrics(np.zeros((2, 7, 64)), np.zeros((2, 7)))


def test_labels_of_another_shape_are_named() -> None:
    given = {**batch(), "labels": batch()["labels"][:, 1:]}
    with pytest.raises(ValueError, match=r"labels have the shape \(3, 6\), input_ids \(3, 7\)"):
        CausalLM()(MODELS["transformers-llama"].build(), **given)


def test_labels_out_of_range_are_named() -> None:
    given = batch()
    given["labels"][0, 2] = 64
    with pytest.raises(ValueError, match=r"label 64 is out of range: the model has 64 tokens"):
        CausalLM()(MODELS["transformers-llama"].build(), **given)


def test_features_of_a_model_without_output_embedding_are_named() -> None:
    with pytest.raises(ValueError, match="BertModel has no output embedding"):
        CausalLM()(
            MODELS["transformers-bert"].build(), input_ids=batch()["input_ids"], features=True
        )


def test_a_model_without_logits_is_named() -> None:
    with pytest.raises(TypeError, match=r"BertModel returned a .* without 'logits'"):
        CausalLM()(MODELS["transformers-bert"].build(), input_ids=batch()["input_ids"])
