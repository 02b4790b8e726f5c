"""OnePrompt in every library's attention, against the attention written out, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import graftune
from graftune import OnePromptConfig
from support.models import MODELS

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def written_out(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Attention over a prefix and a sequence: (B, L, D) each, tokens (length, D)."""
    keys, values = tokens.chunk(2)
    k = torch.cat([keys.expand(len(k), -1, -1), k], 1)
    v = torch.cat([values.expand(len(v), -1, -1), v], 1)
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def by_hand(attention: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    if isinstance(attention, nn.MultiheadAttention):
        q, k, v = F.linear(hidden, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        return attention.out_proj(written_out(q, k, v, tokens, attention.num_heads))
    if hasattr(attention, "qkv"):
        q, k, v = attention.qkv(hidden).chunk(3, -1)
        return attention.proj(written_out(q, k, v, tokens, attention.num_heads))
    q, k, v = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    out = getattr(attention, "out_proj", None) or attention.o_proj
    return out(written_out(q, k, v, tokens, hidden.shape[-1] // attention.head_dim))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**SMALL)
    return transformers.Dinov2Model(config)


BUILDERS = {
    **{
        name: MODELS[name].build
        for name in (
            "transformers-clip",
            "transformers-siglip",
            "transformers-vit",
            "open_clip-vit",
            "timm-vit",
        )
    },
    "transformers-dinov2": dinov2,
    "transformers-clip-vision": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**SMALL)
    ),
}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_each_attention_by_hand(name: str) -> None:
    torch.manual_seed(0)
    model = graftune.wrap(BUILDERS[name]().eval(), OnePromptConfig(lengths=[0, 6]))
    (layer_name,) = (n for n, _ in model.named_modules() if n.endswith(".one_prompt"))
    attention = model.get_submodule(layer_name.removesuffix(".one_prompt"))
    tokens = attention.one_prompt.one_prompt_tokens["default"]
    assert tokens.shape == (6, 32)
    hidden = torch.randn(3, 5, 32)
    with torch.no_grad():
        given = (hidden,) * (3 if isinstance(attention, nn.MultiheadAttention) else 1)
        result = attention(*given)
        attended = result[0] if isinstance(result, tuple) else result
        with model.disable_adapter():
            expected = by_hand(attention, hidden, tokens)
            again = attention(*given)
            plain = by_hand(attention, hidden, tokens[:0])
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(again[0] if isinstance(again, tuple) else again, plain)
    assert (attended - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_every_kernel_of_transformers(kind: str) -> None:
    case = MODELS["transformers-vit"]
    base = case.build()
    base.set_attn_implementation(kind)
    model = graftune.wrap(base, OnePromptConfig(lengths=[4, 4], init_weights=False))
    torch.nn.init.ones_(
        model.get_base_model().vit.layers[0].attention.one_prompt.one_prompt_tokens["default"]
    )
    with torch.no_grad():
        results = model(
            **case.batch(), output_hidden_states=True, output_attentions=kind == "eager"
        )
    assert [h.shape[1] for h in results.hidden_states] == [17] * 3
    if kind == "eager":
        assert [a.shape for a in results.attentions] == [(4, 4, 17, 17)] * 2


def test_normed_keys_are_replaced_behind_the_norm() -> None:
    torch.manual_seed(0)
    attention = timm.layers.Attention(32, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    block = nn.ModuleDict({"attn": attention})
    base = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    config = OnePromptConfig(lengths=[6], blocks="blocks", attention="attn", projections=["qkv"])
    graftune.wrap(base, config)
    tokens = attention.one_prompt.one_prompt_tokens["default"]
    hidden = torch.randn(2, 5, 32)
    q, k, v = attention.qkv(hidden).chunk(3, -1)
    attention.one_prompt._disable_adapters = True
    q, k, v = (each.unflatten(-1, (4, 8)) for each in (q, k, v))
    q, k, v = (each.flatten(2) for each in (attention.q_norm(q), attention.k_norm(k), v))
    expected = attention.proj(written_out(q, k, v, tokens, 4))
    attention.one_prompt._disable_adapters = False
    torch.testing.assert_close(attention(hidden), expected)


def test_a_vit_b_16_has_the_numbers_of_the_paper(tmp_path: Any) -> None:
    with torch.device("meta"):
        base = transformers.ViTModel(transformers.ViTConfig())
    model = graftune.wrap(base.to_empty(device="cpu"), "ovor")
    assert model.get_nb_trainable_parameters()[0] == 107_520
    tokens = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in tokens] == [(10, 768)] * 2 + [(40, 768)] * 3
    assert all(p.min() >= 0 and p.max() <= 1 for p in tokens)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**19


def test_prompts_beside_lora_on_the_projections_train_together() -> None:
    import peft

    case = MODELS["transformers-vit"]
    lora = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=["k_proj", "v_proj"]))
    model = graftune.wrap(lora.get_base_model(), OnePromptConfig(lengths=[4, 4]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "one_prompt" in name)
    model(**case.batch()).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_adapter_at_a_time() -> None:
    case = MODELS["transformers-vit"]
    model = graftune.wrap(case.build(), OnePromptConfig(lengths=[4]))
    graftune.wrap(model, OnePromptConfig(lengths=[2, 2]), adapter_name="b")
    model.set_adapter("b")
    model(**case.batch())
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="one adapter at a time"):
        model(**case.batch())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [5]}, "`lengths` must be an even number from 0 to 512.*got 5"),
        ({"lengths": [514]}, "`lengths` must be an even number from 0 to 512.*got 514"),
        ({"lengths": [-2]}, "`lengths` must be an even number"),
        ({"lengths": [0, 0]}, "no prompts in any block"),
        ({"lengths": [0, 0, 4]}, "prompts in block 2, and the model has the blocks 0 to 1"),
        ({"blocks": "x", "attention": "a", "projections": []}, "`blocks` is 'x'"),
        ({"blocks": "vit.layers", "attention": "a", "projections": []}, "`attention` is 'a'"),
    ],
)
def test_bad_configs_are_refused_before_the_model_is_touched(
    fields: dict[str, Any], message: str
) -> None:
    base = MODELS["transformers-vit"].build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        graftune.wrap(base, OnePromptConfig(**{"lengths": [4, 4], **fields}))
    assert [name for name, _ in base.named_modules()] == names
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize(
    "name", ["open_clip-resnet", "transformers-llama", "timm-convnext", "torch-cnn"]
)
def test_models_without_a_vision_transformer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no vision transformer whose attentions are known"):
        graftune.wrap(MODELS[name].build(), "ovor")


def test_attentions_without_a_way_in_are_refused() -> None:
    base = MODELS["transformers-vit"].build()
    config = OnePromptConfig(
        lengths=[4], blocks="vit.layers", attention="mlp", projections=["fc1", "fc2"]
    )
    with pytest.raises(TypeError, match="is not an attention that prefixes are supported for"):
        graftune.wrap(base, config)


def test_masks_are_refused() -> None:
    model = graftune.wrap(MODELS["open_clip-vit"].build(), OnePromptConfig(lengths=[4]))
    attention = model.get_base_model().visual.transformer.resblocks[0].attn
    hidden = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="without an attention mask"):
        attention(hidden, hidden, hidden, attn_mask=torch.zeros(5, 5))
    assert attention.bias_k is attention.bias_v is None


def test_an_attention_that_does_not_call_its_projections_is_noticed() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight)[..., :8]

    base = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": Silent()})])})
    config = OnePromptConfig(lengths=[4], blocks="blocks", attention="attn", projections=["qkv"])
    graftune.wrap(base, config)
    with pytest.raises(RuntimeError, match="does not call its projections as modules"):
        base["blocks"][0]["attn"](torch.randn(2, 3, 8))


def test_peft_users_name_the_modules() -> None:
    from peft import get_peft_model

    with pytest.raises(ValueError, match="needs blocks, attention, projections"):
        get_peft_model(MODELS["transformers-vit"].build(), OnePromptConfig())


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit"])
def test_compiled_equals_eager(name: str) -> None:
    case = MODELS[name]
    model = graftune.wrap(case.build(), OnePromptConfig(lengths=[4, 4]))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(case.run(compiled, case.batch()), case.run(model, case.batch()))
