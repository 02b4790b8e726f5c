"""Prompt pools by hand: queries, choices, compositions, what is frozen, and their errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import graftune
from graftune import CodaPromptConfig, DualPromptConfig, L2PConfig
from graftune.adapters.prompts.pools import PoolLayer, start_task
from graftune.adapters.prompts.pools.functional import component_weights, orthogonality
from graftune.adapters.regularizers import (
    FrozenDistillation,
    KeyMatching,
    PromptOrthogonality,
    Regularization,
)
from graftune.integrations.objectives import ImageClassifier
from support.models import MODELS

CASE = MODELS["transformers-vit"]
L2P = {"pool_size": 6, "length": 2, "chosen": 3}
DUAL: dict[str, Any] = {
    "general_length": 4,
    "general_blocks": [0],
    "expert_length": 6,
    "expert_blocks": [1],
    "tasks": 3,
}
CODA: dict[str, Any] = {"pool_size": 6, "length": 4, "prompt_blocks": [1], "tasks": 3}


def wrapped(config: Any, base: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return graftune.wrap(CASE.build() if base is None else base, config, **options)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PoolLayer)]


def queries(batch: dict[str, Tensor]) -> Tensor:
    """What the base model says of images: its class token behind the last norm."""
    with torch.no_grad():
        return CASE.build().vit(batch["pixel_values"]).last_hidden_state[:, 0]


def by_hand(model: Any, batch: dict[str, Tensor], attend: Any, tokens: Any = None) -> Tensor:
    """The base model's blocks, with other attentions and further tokens."""
    vit = CASE.build().vit
    hidden = vit.embeddings(batch["pixel_values"])
    length = hidden.shape[1]
    if tokens is not None:
        hidden = torch.cat([hidden, tokens], 1)
    for number, block in enumerate(vit.layers):
        normed = block.layernorm_before(hidden)
        hidden = hidden + attend(number, block.attention, normed)
        hidden = hidden + block.mlp(block.layernorm_after(hidden))
    return model.get_base_model().classifier(vit.layernorm(hidden[:, :length])[:, 0])


def with_prefix(attention: Any, hidden: Tensor, prompt: Tensor) -> Tensor:
    """Attention with a prompt, (B, n, D): keys, then values."""
    keys, values = prompt.chunk(2, dim=1)
    q = attention.q_proj(hidden)
    k = torch.cat([keys, attention.k_proj(hidden)], 1)
    v = torch.cat([values, attention.v_proj(hidden)], 1)
    q, k, v = (each.unflatten(-1, (4, 8)).transpose(1, 2) for each in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v)
    return attention.o_proj(attended.transpose(1, 2).flatten(2))


def test_l2p_by_hand() -> None:
    model, batch = wrapped(L2PConfig(**L2P)), CASE.batch()
    (layer,) = layers(model)
    prompts, keys = layer.l2p_prompts["default"], layer.l2p_keys["default"]
    assert prompts.shape == (6, 2, 32)
    with torch.no_grad():
        alike = F.cosine_similarity(queries(batch)[:, None], keys[None], dim=-1)
        nearest = alike.topk(3).indices
        expected = by_hand(
            model, batch, lambda _, attention, h: attention(h)[0], prompts[nearest].flatten(1, 2)
        )
        torch.testing.assert_close(model(**batch).logits, expected)
        torch.testing.assert_close(layer.matching, (1 - alike.gather(1, nearest)).sum(1))


@pytest.mark.parametrize("training", [True, False])
def test_dual_prompt_by_hand(training: bool) -> None:
    model, batch = wrapped(DualPromptConfig(**DUAL)), CASE.batch()
    start_task(model, 1)
    model.train(training)
    general, expert = layers(model)
    keys = expert.dual_prompt_keys["default"]
    assert keys.shape == (3, 32)
    assert "default" not in general.dual_prompt_keys
    with torch.no_grad():
        alike = F.cosine_similarity(queries(batch)[:, None], keys[None, :2], dim=-1)
        chosen = torch.ones(4, dtype=torch.long) if training else alike.argmax(1)
        prompts = [
            general.dual_prompt_prefixes["default"].expand(4, -1, -1),
            expert.dual_prompt_prefixes["default"][chosen],
        ]
        expected = by_hand(model, batch, lambda n, a, h: with_prefix(a, h, prompts[n]))
        torch.testing.assert_close(model(**batch).logits, expected)
        torch.testing.assert_close(expert.matching, 1 - alike[:, 1])


def test_coda_prompt_by_hand() -> None:
    model, batch = wrapped(CodaPromptConfig(**CODA)), CASE.batch()
    start_task(model, 1)
    (layer,) = layers(model)
    tensors = [getattr(layer, name)["default"] for name in layer.adapter_layer_names]
    assert orthogonality(tensors[0]) < 1e-10  # orthonormal at the start
    with torch.no_grad():
        components, keys, attention = (tensor[:4] for tensor in tensors)
        attended = queries(batch)[:, None] * attention
        weights = F.cosine_similarity(attended, keys[None], dim=-1)
        torch.testing.assert_close(component_weights(queries(batch), attention, keys), weights)
        prompt = torch.einsum("bm,mld->bld", weights, components)
        expected = by_hand(
            model, batch, lambda n, a, h: with_prefix(a, h, prompt) if n else a(h)[0]
        )
        torch.testing.assert_close(model(**batch).logits, expected)


def test_earlier_components_get_no_gradient() -> None:
    model = wrapped(CodaPromptConfig(**CODA, init_weights=False))
    start_task(model, 1)
    model(**CASE.batch()).logits.square().sum().backward()
    (layer,) = layers(model)
    for name in layer.adapter_layer_names:
        rows = getattr(layer, name)["default"].grad.flatten(1).abs().sum(1) > 0
        assert rows.tolist() == [False, False, True, True, False, False]


def test_only_the_prompt_of_the_task_gets_a_gradient() -> None:
    model = wrapped(DualPromptConfig(**DUAL)).train()
    start_task(model, 2)
    model(**CASE.batch()).logits.square().sum().backward()
    expert = layers(model)[1].dual_prompt_prefixes["default"].grad
    assert (expert.flatten(1).abs().sum(1) > 0).tolist() == [False, False, True]


def test_keys_learn_from_their_term() -> None:
    for config, recipe_weight in ((L2PConfig(**L2P), 0.5), (DualPromptConfig(**DUAL), 1.0)):
        model = wrapped(config, regularizers=[KeyMatching(recipe_weight), FrozenDistillation()])
        batch = {**CASE.batch(), "labels": torch.tensor([0, 1, -100, 2])}
        regularizers = [KeyMatching(recipe_weight), FrozenDistillation()]
        losses = Regularization(model.train(), regularizers)(ImageClassifier(), model, batch)
        distances = [d for layer in layers(model) if (d := layer.matching) is not None]
        expected = recipe_weight * torch.stack(distances).sum(0)[[0, 1, 3]].mean()
        torch.testing.assert_close(losses["terms"]["key_matching"], expected)
        losses["loss"].backward()
        keys = [p for name, p in model.named_parameters() if "keys" in name]
        assert keys
        assert all(p.grad.any() for p in keys)


def test_components_are_kept_apart_by_their_term() -> None:
    model = wrapped(CodaPromptConfig(**CODA, init_weights=False))
    model(**CASE.batch())
    (layer,) = layers(model)
    step = graftune.adapters.regularizers.Step(model, {})
    (term,) = PromptOrthogonality(0.5).terms(step).values()
    rows = [getattr(layer, n)["default"][:2].flatten(1) for n in layer.adapter_layer_names]
    expected = sum((r @ r.T - torch.eye(2)).square().mean() for r in rows) / 2
    torch.testing.assert_close(term, expected)


@pytest.mark.parametrize("name", ["l2p", "dual_prompt", "coda_prompt"])
def test_recipes_have_their_terms(name: str) -> None:
    model = wrapped(name, **{"l2p": L2P, "dual_prompt": DUAL, "coda_prompt": CODA}[name])
    (regularizer,) = graftune.adapters.regularizers.recorded(model.active_peft_config)
    regularizer.check(model)
    expected = PromptOrthogonality() if name == "coda_prompt" else KeyMatching()
    assert type(regularizer) is type(expected)
    with pytest.raises(TypeError, match="is about the prompts of"):
        regularizer.check(wrapped("ovor", lengths=[4]))


def test_the_task_is_saved(tmp_path: Path) -> None:
    model = wrapped(DualPromptConfig(**DUAL))
    start_task(model, 2)
    with torch.no_grad():
        expected = model(**CASE.batch()).logits
    model.save_pretrained(tmp_path)
    again = graftune.load(CASE.build(), tmp_path)
    again.get_base_model().classifier = model.get_base_model().classifier
    assert again.active_peft_config.task == 2
    with torch.no_grad():
        torch.testing.assert_close(again(**CASE.batch()).logits, expected)


def test_one_query_for_all_blocks_and_adapters() -> None:
    model = wrapped(CodaPromptConfig(**{**CODA, "prompt_blocks": [0, 1]}))
    graftune.wrap(model, CodaPromptConfig(**CODA), adapter_name="b")
    passes = []
    norm = model.get_base_model().vit.layernorm
    norm.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    model(**CASE.batch())
    assert passes == [False, True]
    with model.disable_adapter():
        model(**CASE.batch())
    assert len(passes) == 3


def test_a_model_is_copied_in_the_middle_of_training() -> None:
    model = wrapped(CodaPromptConfig(**CODA))
    result = model(**CASE.batch()).logits
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(**CASE.batch()).logits, result)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("make", "feature"),
    [
        (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)), "first"),
        (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)), "first"),
        (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)), "pooled"),
        (
            lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
            "pooled",
        ),
    ],
)
def test_queries_of_bare_towers(make: Any, feature: str) -> None:
    base, pixels = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = base(pixels)
    expected = output.pooler_output if feature == "pooled" else output.last_hidden_state[:, 0]
    model = wrapped(CodaPromptConfig(**CODA), base)
    seen: list[Tensor] = []
    layers(model)[0].answer = lambda queries: seen.append(queries)
    with pytest.raises(RuntimeError, match="no query came before the blocks ran"):
        model(pixel_values=pixels)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_queries_of_timm(pool: str) -> None:
    import timm

    base = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        global_pool=pool,
        class_token=pool == "token",
        fc_norm=False,
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = base.forward_head(base.forward_features(pixels), pre_logits=True)
    model = wrapped(CodaPromptConfig(**CODA), base)
    seen: list[Tensor] = []
    layers(model)[0].answer = lambda queries: seen.append(queries)
    with pytest.raises(RuntimeError, match="no query came"):
        model(pixels)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2PConfig(chosen=11), "chosen=11 prompts cannot be taken of a pool of 10"),
        (lambda: L2PConfig(pool_size=0), "`pool_size` must be a whole number of at least 1"),
        (lambda: L2PConfig(query_pool="max"), "`query_pool` is 'first' or 'mean'"),
        (lambda: DualPromptConfig(expert_length=5), "`expert_length` must be an even number"),
        (lambda: DualPromptConfig(expert_length=0), "leaves no expert prompts"),
        (lambda: DualPromptConfig(expert_blocks=[1, 2]), "different blocks"),
        (lambda: DualPromptConfig(tasks=2, task=2), "task 2 .* is more than the pool was made for"),
        (lambda: CodaPromptConfig(length=0), "`length` must be at least 2"),
        (lambda: CodaPromptConfig(length=3), "`length` must be an even number"),
        (lambda: CodaPromptConfig(tasks=7), "pool_size=100 components cannot be divided evenly"),
        (lambda: CodaPromptConfig(prompt_blocks=[]), "`prompt_blocks` must be one or more"),
    ],
)
def test_bad_configs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_more_tasks_than_the_pool_was_made_for() -> None:
    model = wrapped(CodaPromptConfig(**CODA))
    with pytest.raises(ValueError, match=r"made for: it has tasks=3; make it .*CodaPromptConfig"):
        start_task(model, 3)
    assert model.active_peft_config.task == 0
    start_task(wrapped("ovor", lengths=[4]), 100)  # has no tasks


def test_peft_users_name_the_modules() -> None:
    config = L2PConfig(
        **L2P, blocks="vit.layers", attention="attention", projections=["k_proj", "v_proj"]
    )
    with pytest.raises(ValueError, match="L2PConfig needs tower, entry, query"):
        peft.get_peft_model(CASE.build(), config)
