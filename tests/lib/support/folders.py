"""Small base models and data in folders, as a user has them: everything that a name can lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from support.models import MODELS
from support.text import byte_tokenizer

EMBEDDED = Path(__file__).resolve().parents[3] / "examples" / "embedded" / "clip"
COLOURS = {
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "yellow": (255, 255, 0),
}
SENTENCES = [f"the capital of France is Paris and {n} is a number" for n in range(24)]


def pictures(folder: Path, count: int = 6, size: int = 40) -> str:
    """Noisy pictures of four colours, a subfolder each."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = generator.integers(0, 80, (size, size, 3))
            values = np.clip(np.array(colour) + noise - 40, 0, 255).astype(np.uint8)
            Image.fromarray(values).save(folder / name / f"{index}.png")
    return str(folder)


def texts(file: Path, count: int = 24) -> str:
    """Texts as JSON lines."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES[:count]))
    return str(file)


def clip(folder: Path) -> str:
    """A small CLIP of transformers that reads the embedded CLIP's texts and pictures."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(EMBEDDED)
    tokenizer = processor.tokenizer
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**shared, **text, "max_position_embeddings": 32},
        vision_config={**shared, "image_size": 48, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def causal_lm(folder: Path, length: int = 64) -> str:
    """A small language model of transformers with a tokenizer, for so many tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(model_max_length=length)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(folder: Path, names: list[str] | None = None) -> str:
    """A small ViT of transformers with five outputs, or one for each name."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    labels: dict[str, Any] = {"num_labels": 5}
    if names is not None:
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        **labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def timm_model(folder: Path) -> str:
    """A small ViT of timm with five outputs."""
    from timm.models import save_for_hf

    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    save_for_hf(MODELS["timm-vit"].build(), folder, model_args=settings, safe_serialization=True)
    return str(folder)


def open_clip_model(folder: Path) -> str:
    """A small CLIP of open_clip that reads texts as all of its CLIPs do."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file

    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(24, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    content = {"model_cfg": config, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return str(folder)


def pixel_pipeline(folder: Path, classes: int | None = None) -> str:
    """A small denoiser of pixels, of classes if their number is given."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return str(folder)


def latent_pipeline(folder: Path) -> str:
    """A small denoiser of a VAE's latents by texts, in the parts of Stable Diffusion."""
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED)
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
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
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(num_train_timesteps=20),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)
