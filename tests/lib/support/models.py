"""Small, randomly initialised models of every family, each with an input and one output tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Run = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class ModelCase:
    """A model family's representative.

    Args:
        name: library and architecture.
        make: builds the model; called under a fixed seed by `build`.
        inputs: makes a batch of the given size.
        run: one forward pass, returning one tensor whose first axis is the batch.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    run: Run

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().eval()
            # Some libraries start with (near) zeros in output layers, norms and layer scales,
            # behind which no adapter could be seen.
            for name, parameter in model.named_parameters():
                if name.endswith(("weight", "gamma")) and parameter.abs().max() < 1e-3:
                    nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
        return model

    def batch(self, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs(size)


def loss(output: torch.Tensor) -> torch.Tensor:
    """A loss that no normalisation at a model's end makes constant: mean of output × noise."""
    generator = torch.Generator().manual_seed(2)
    # One row's noise for all rows, so that a batch's loss is the mean of its parts' losses.
    noise = torch.randn(output.shape[1:], generator=generator).to(output.device)
    return (output.float() * noise).mean()


def _first(output: object) -> torch.Tensor:
    for name in ("logits_per_image", "logits", "sample", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def _call(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return _first(model(**batch))


def _call_first(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return _first(model(batch["x"]))


def _pixels(size: int, side: int = 32) -> torch.Tensor:
    return torch.randn(size, 3, side, side)


def _tokens(size: int, vocabulary: int = 64, length: int = 7) -> torch.Tensor:
    return torch.randint(1, vocabulary - 1, (size, length))


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**_SMALL, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def _clip_inputs(size: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(3)
    tokens[:, -1] = 63
    return {"input_ids": tokens, "pixel_values": _pixels(size)}


def _transformers_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {**_SMALL, "vocab_size": 64, "max_position_embeddings": 16}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def _transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_SMALL, image_size=32, patch_size=8, num_labels=5))


def _transformers_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2, vocab_size=64))


def _transformers_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    )


def _transformers_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_SMALL, vocab_size=64))


def _open_clip(vision: dict) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=4, layers=2)
    return CLIP(24, CLIPVisionCfg(image_size=32, **vision), text)


def _open_clip_vit() -> nn.Module:
    return _open_clip({"layers": 2, "width": 32, "head_width": 8, "patch_size": 8})


def _open_clip_resnet() -> nn.Module:
    return _open_clip({"layers": (1, 1, 1, 1), "width": 8, "head_width": 8})


def _open_clip_inputs(size: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(3, length=16)
    tokens[:, -1] = 63
    return {"image": _pixels(size), "text": tokens}


def _open_clip_run(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    image, text, scale = model(**batch)
    return scale * image @ text.T


def _timm_vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=5,
    )


def _timm_convnext() -> nn.Module:
    import timm

    return timm.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5
    )


def _diffusers_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _unet_inputs(size: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(size, 4, 8, 8),
        "timestep": torch.full((size,), 10),
        "encoder_hidden_states": torch.randn(size, 5, 16),
    }


def _diffusers_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def _dit_inputs(size: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(size, 4, 8, 8),
        "timestep": torch.full((size,), 3),
        "class_labels": torch.arange(size) % 10,
    }


def _torch_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class SmallCNN(nn.Module):
    """Convolutions of every kind, plain modules only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.GroupNorm(4, 16)
        self.dilated = nn.Conv2d(16, 16, (3, 5), padding=(2, 4), dilation=2)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.grouped(torch.relu(self.stem(x)))))
        x = torch.relu(self.up(torch.relu(self.dilated(x))))
        return self.head(x.mean((2, 3)))


MODELS = {
    case.name: case
    for case in (
        ModelCase("transformers-clip", _transformers_clip, _clip_inputs, _call),
        ModelCase(
            "transformers-siglip",
            _transformers_siglip,
            lambda size: {"input_ids": _tokens(3), "pixel_values": _pixels(size)},
            _call,
        ),
        ModelCase(
            "transformers-vit",
            _transformers_vit,
            lambda size: {"pixel_values": _pixels(size)},
            _call,
        ),
        ModelCase(
            "transformers-llama",
            _transformers_llama,
            lambda size: {"input_ids": _tokens(size)},
            _call,
        ),
        ModelCase(
            "transformers-gpt2",
            _transformers_gpt2,
            lambda size: {"input_ids": _tokens(size)},
            _call,
        ),
        ModelCase(
            "transformers-bert",
            _transformers_bert,
            lambda size: {"input_ids": _tokens(size)},
            _call,
        ),
        ModelCase("open_clip-vit", _open_clip_vit, _open_clip_inputs, _open_clip_run),
        ModelCase("open_clip-resnet", _open_clip_resnet, _open_clip_inputs, _open_clip_run),
        ModelCase("timm-vit", _timm_vit, lambda size: {"x": _pixels(size)}, _call_first),
        ModelCase(
            "timm-convnext", _timm_convnext, lambda size: {"x": _pixels(size, 64)}, _call_first
        ),
        ModelCase("diffusers-unet", _diffusers_unet, _unet_inputs, _call),
        ModelCase("diffusers-dit", _diffusers_dit, _dit_inputs, _call),
        ModelCase(
            "torch-transformer",
            _torch_transformer,
            lambda size: {"x": torch.randn(size, 6, 32)},
            _call_first,
        ),
        ModelCase("torch-cnn", SmallCNN, lambda size: {"x": _pixels(size, 16)}, _call_first),
    )
}
