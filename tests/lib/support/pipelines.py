"""Small pipelines of diffusers, and what they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support import folders


def stable_diffusion(folder: Path) -> Any:
    """A pipeline in the parts of Stable Diffusion, from a folder that is made on the first call."""
    from diffusers import StableDiffusionPipeline

    if not folder.exists():
        folders.latent_pipeline(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(guidance_embeds: bool = True) -> Any:
    """A pipeline in the parts of Flux, with a VAE of one block and no text encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        for parameter in transformer.parameters():  # some start at zero
            nn.init.normal_(parameter, std=0.1)
        vae = AutoencoderKL(
            block_out_channels=(4,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=2,
            latent_channels=1,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **options: Any) -> Tensor:
    """What a pipeline draws from one seed, (1, height, width, 3)."""
    generator = torch.Generator().manual_seed(0)
    if type(pipeline).__name__ == "FluxPipeline":
        texts = torch.randn(1, 5, 32, generator=generator)
        options |= {"prompt_embeds": texts, "pooled_prompt_embeds": texts[:, 0]}
    else:
        options |= {"prompt": "a cat"}
    drawn = pipeline(
        num_inference_steps=2,
        generator=generator,
        height=16,
        width=16,
        output_type="np",
        **options,
    )
    return torch.from_numpy(drawn.images)
