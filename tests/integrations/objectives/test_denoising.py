"""The loss is the one that diffusers' training scripts compute, and noise is drawn once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

import graftune
from graftune import Denoising
from graftune.integrations.objectives.noising import min_snr_weights
from support.models import MODELS

SAMPLE = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONS = {
    "diffusers-unet": {
        "encoder_hidden_states": torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    },
    "diffusers-dit": {"class_labels": torch.arange(4)},
    "unconditional": {},
}


def build(name: str) -> nn.Module:
    if name != "unconditional":
        return MODELS[name].build()
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def case(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return build(name), {"sample": SAMPLE, **CONDITIONS[name]}


def target(scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Written out: ε, x, or √ᾱ ε − √(1 − ᾱ) x."""
    if scheduler.config.prediction_type in ("epsilon", "sample"):
        return noise if scheduler.config.prediction_type == "epsilon" else SAMPLE
    alpha = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * SAMPLE


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_type", [DDPMScheduler, DDIMScheduler])
def test_the_loss_is_that_of_the_training_scripts(
    name: str, prediction_type: str, scheduler_type: Any
) -> None:
    model, given = case(name)
    scheduler = scheduler_type(prediction_type=prediction_type)
    objective = Denoising(scheduler)
    batch = objective.draw(given)
    noise, timesteps = batch["noise"], batch["timesteps"]
    with torch.no_grad():
        output = objective(model, **batch)
        noised = scheduler.add_noise(SAMPLE, noise, timesteps)
        own = model(noised, timesteps, **CONDITIONS[name]).sample
    expected = F.mse_loss(own, target(scheduler, noise, timesteps))
    torch.testing.assert_close(output["loss"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(output["logits"], own)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_drawn_batch_gives_equal_outputs(name: str) -> None:
    model, given = case(name)
    objective = Denoising(DDPMScheduler())
    with torch.no_grad():
        undrawn = [objective(model, **given)["logits"] for _ in range(2)]
        batch = objective.draw(given)
        drawn = [objective(model, **batch)["logits"] for _ in range(2)]
    assert not torch.equal(*undrawn)
    assert torch.equal(*drawn)
    again = objective.draw(batch)
    assert again["noise"] is batch["noise"]
    assert again["timesteps"] is batch["timesteps"]
    assert "noise" not in given


def test_the_adapted_and_the_frozen_model_see_the_same_noise() -> None:
    base, given = case("diffusers-unet")
    model = graftune.wrap(base, LoraConfig(r=2)).eval()  # starts as the base model
    objective = Denoising(DDPMScheduler())
    batch = objective.draw(given)
    with torch.no_grad():
        adapted = objective(model, **batch)["logits"]
        with model.disable_adapter():
            torch.testing.assert_close(objective(model, **batch)["logits"], adapted)


def test_draws_follow_torchs_seed() -> None:
    objective = Denoising(DDPMScheduler())
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(objective.draw({"sample": SAMPLE}))
    assert torch.equal(drawn[0]["noise"], drawn[1]["noise"])
    assert torch.equal(drawn[0]["timesteps"], drawn[1]["timesteps"])
    assert not torch.equal(drawn[0]["noise"], drawn[2]["noise"])


def test_timesteps_are_uniform_over_those_of_training() -> None:
    objective = Denoising(DDPMScheduler(num_train_timesteps=5))
    drawn = objective.draw({"sample": torch.zeros(5000, 1)})["timesteps"]
    counts = torch.bincount(drawn, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 850  # of 1000 each, with a standard deviation of 28


def test_the_first_half_of_a_model_with_variances_counts() -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()
    objective = Denoising(DDPMScheduler())
    batch = objective.draw({"sample": SAMPLE, **CONDITIONS["diffusers-dit"]})
    with torch.no_grad():
        output = objective(model, **batch)
        noised = DDPMScheduler().add_noise(SAMPLE, batch["noise"], batch["timesteps"])
        own = model(noised, batch["timesteps"], batch["class_labels"]).sample
    assert own.shape[1] == 8
    assert torch.equal(output["logits"], own[:, :4])
    torch.testing.assert_close(output["loss"], F.mse_loss(own[:, :4], batch["noise"]))


def test_half_precision_samples_are_noised_in_float32() -> None:
    model = build("unconditional").to(torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    objective = Denoising(DDPMScheduler())
    batch = objective.draw({"sample": SAMPLE.bfloat16()})
    output = objective(model, **batch)
    exact = DDPMScheduler().add_noise(
        batch["sample"].float(), batch["noise"].float(), batch["timesteps"]
    )
    assert torch.equal(seen[0], exact.bfloat16())
    assert output["loss"].dtype == torch.float32


@pytest.mark.parametrize("name", ["diffusers-unet", "unconditional"])
def test_features_are_the_middle_blocks(name: str) -> None:
    model, given = case(name)
    seen: list[torch.Tensor] = []
    model.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    output = Denoising(DDPMScheduler())(model, **given, features=True)
    assert output["features"]["mid"] is seen[0]


def test_features_of_a_model_without_a_middle_block_are_named() -> None:
    model, given = case("diffusers-dit")
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no mid_block"):
        Denoising(DDPMScheduler())(model, **given, features=True)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="score"), "'score'; allowed are 'epsilon', 'v_predict"),
        (None, "NoneType has the prediction type None"),
        (EulerDiscreteScheduler(), r"EulerDiscreteScheduler is made for sampling.*from_config"),
        (PNDMScheduler(), r"PNDMScheduler is made for sampling.*from_config"),
        (DPMSolverMultistepScheduler(), r"DPMSolverMultistepScheduler is made for sampling"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_schedulers_are_named(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising(scheduler)


@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, PNDMScheduler])
def test_the_advised_scheduler_has_the_samplers_noise(sampler: Any) -> None:
    given = sampler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = DDPMScheduler.from_config(given.config)
    Denoising(scheduler)
    torch.testing.assert_close(scheduler.alphas_cumprod, given.alphas_cumprod)


def flow_transformer(
    name: str, guidance_embeds: bool = False
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A small transformer, samples for it, and what else it takes."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    texts = {
        "encoder_hidden_states": torch.randn(4, 5, 32),
        "pooled_projections": torch.ones(4, 32),
    }
    if name == "sd3":
        model = SD3Transformer2DModel(
            **sizes,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
        return model.eval(), {"sample": SAMPLE}, texts
    model = FluxTransformer2DModel(
        **sizes,
        patch_size=1,
        in_channels=4,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    places = {"img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(5, 3)}
    return model.eval(), {"sample": SAMPLE.flatten(2).transpose(1, 2)}, {**texts, **places}


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_goes_from_the_sample_to_the_noise(name: str, shift: float) -> None:
    model, given, conditions = flow_transformer(name)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = Denoising(scheduler)
    scheduler.set_timesteps(4)  # sampling meanwhile changes nothing
    batch = objective.draw(given)
    noise, timesteps, sample = batch["noise"], batch["timesteps"], given["sample"]
    with torch.no_grad():
        output = objective(model, **batch, **conditions)
        fresh = FlowMatchEulerDiscreteScheduler(shift=shift)
        noised = fresh.scale_noise(sample, timesteps, noise)
        taken = timesteps / 1000 if name == "flux" else timesteps
        own = model(noised, timestep=taken, **conditions).sample
    torch.testing.assert_close(output["logits"], own)
    torch.testing.assert_close(output["loss"], F.mse_loss(own, noise - sample))


def test_densities_of_timesteps() -> None:
    given = {"sample": torch.zeros(20000, 1)}
    shares = {
        density: Denoising(FlowMatchEulerDiscreteScheduler(), density).draw(given)["timesteps"]
        / 1000
        for density in ("uniform", "logit_normal")
    }
    assert shares["uniform"].mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares["uniform"].var().item() == pytest.approx(1 / 12, abs=0.003)
    # The variance of a logistic-normal number, by numerical integration.
    assert shares["logit_normal"].var().item() == pytest.approx(0.0434, abs=0.003)
    with pytest.raises(ValueError, match="'logit_normal' is for flows"):
        Denoising(DDPMScheduler(), "logit_normal")
    with pytest.raises(ValueError, match="'uniform' or 'logit_normal', got 'cosine'"):
        Denoising(FlowMatchEulerDiscreteScheduler(), "cosine")


def test_samples_of_prior_preservation_have_a_weight_of_their_own() -> None:
    model, given = case("unconditional")
    objective = Denoising(DDPMScheduler(), prior_weight=0.3)
    batch = objective.draw(given)
    prior = torch.tensor([True, False, False, True])
    with torch.no_grad():
        loss = objective(model, **batch, prior=prior)["loss"]
        output = Denoising(DDPMScheduler())(model, **batch)
        losses = (output["logits"] - batch["noise"]).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, torch.where(prior, 0.3 * losses, losses).mean())
    with pytest.raises(ValueError, match="`prior_weight` must be at least 0, got -1"):
        Denoising(DDPMScheduler(), prior_weight=-1)


def test_a_prediction_of_another_shape_is_named() -> None:
    model, given = case("unconditional")
    model.conv_out = nn.Conv2d(8, 3, 3, padding=1)
    with pytest.raises(ValueError, match=r"has the shape \(4, 3, 8, 8\), the sample \(4, 4, 8, 8"):
        Denoising(DDPMScheduler())(model, **given)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_samples_losses(prediction_type: str) -> None:
    model, given = case("unconditional")
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    objective = Denoising(scheduler, snr_gamma=5.0)
    timesteps = torch.tensor([0, 10, 400, 999])
    batch = objective.draw({**given, "timesteps": timesteps})
    with torch.no_grad():
        output = objective(model, **batch)
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[prediction_type]
    weights = torch.minimum(snr, torch.tensor(5.0)) / divisor
    error = output["logits"] - target(scheduler, batch["noise"], timesteps)
    losses = error.square().flatten(1).mean(1)
    torch.testing.assert_close(output["loss"], (weights * losses).mean())


def test_min_snr_at_a_terminal_snr_of_zero_is_finite() -> None:
    alphas = torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert min_snr_weights(alphas, 5.0, "epsilon").tolist() == [1.0, 1.0]
    assert min_snr_weights(alphas, 5.0, "v_prediction").tolist() == [0.0, 0.5]
    assert min_snr_weights(alphas, 0.5, "sample").tolist() == [0.0, 0.5]


def test_min_snr_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"`snr_gamma` weighs diffusion's.*of a flow"):
        Denoising(FlowMatchEulerDiscreteScheduler(), snr_gamma=5.0)
    with pytest.raises(ValueError, match="`snr_gamma` must be above 0 or None, got 0"):
        Denoising(DDPMScheduler(), snr_gamma=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_model_in_float64_keeps_its_precision(prediction_type: str) -> None:
    model, given = case("unconditional")
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    objective = Denoising(scheduler)
    batch = objective.draw({"sample": given["sample"].double()})
    with torch.no_grad():
        output = objective(model.double(), **batch)
    alphas = scheduler.alphas_cumprod.double()[batch["timesteps"]][:, None, None, None]
    sample, noise = batch["sample"], batch["noise"]
    with torch.no_grad():
        noised = scheduler.add_noise(sample, noise, batch["timesteps"])
        own = model(noised, batch["timesteps"]).sample
    y = {
        "epsilon": noise,
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * sample,
        "sample": sample,
    }[prediction_type]
    assert output["loss"].dtype == torch.float64
    torch.testing.assert_close(output["loss"], F.mse_loss(own, y), rtol=1e-12, atol=0)


def test_sdxls_conditions_are_handed_on() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
    ).eval()
    added = {"text_embeds": torch.randn(4, 24), "time_ids": torch.randn(4, 6)}
    texts = torch.randn(4, 5, 16)
    objective = Denoising(DDPMScheduler())
    batch = objective.draw({"sample": SAMPLE})
    with torch.no_grad():
        output = objective(unet, **batch, encoder_hidden_states=texts, added_cond_kwargs=added)
        noised = DDPMScheduler().add_noise(SAMPLE, batch["noise"], batch["timesteps"])
        own = unet(noised, batch["timesteps"], texts, added_cond_kwargs=added).sample
    torch.testing.assert_close(output["loss"], F.mse_loss(own, batch["noise"]))


def test_a_guidance_scale_that_is_embedded_has_to_be_given() -> None:
    model, given, conditions = flow_transformer("flux", guidance_embeds=True)
    objective = Denoising(FlowMatchEulerDiscreteScheduler())
    batch = objective.draw(given)
    with pytest.raises(ValueError, match="embeds a guidance scale: give `guidance`"):
        objective(model, **batch, **conditions)
    with torch.no_grad():
        losses = [
            objective(model, **batch, **conditions, guidance=torch.full((4,), scale))["loss"]
            for scale in (1.0, 3.5)
        ]
    assert not torch.equal(*losses)


@pytest.mark.parametrize(
    ("name", "taken"), [("QwenImageTransformer2DModel", 0.25), ("SanaTransformer2DModel", 250.0)]
)
def test_timesteps_are_in_the_models_own_unit(name: str, taken: float) -> None:
    seen: list[torch.Tensor] = []

    def forward(self: nn.Module, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(timestep)
        return x

    model = type(name, (nn.Module,), {"forward": forward})()
    objective = Denoising(FlowMatchEulerDiscreteScheduler())
    objective(model, sample=SAMPLE, timesteps=torch.full((4,), 250.0))
    assert seen[0].tolist() == [taken] * 4


def test_reversed_time_is_refused_by_name() -> None:
    model = type("Lumina2Transformer2DModel", (nn.Module,), {})()
    with pytest.raises(ValueError, match="time runs from noise to sample in Lumina2Transformer"):
        Denoising(FlowMatchEulerDiscreteScheduler())(model, sample=SAMPLE)
