"""Prediction from noised samples, as diffusion models and flows are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftune.adapters.base.precision import at_least_float32
from graftune.integrations.objectives import taps
from graftune.integrations.objectives.labels import divided
from graftune.integrations.objectives.noising import Density, noising
from graftune.integrations.objectives.unwrap import base_of, tensor_of

# Transformers of flows that are given σ as the timestep, by how their classes' names begin; and
# those for which time runs from noise to sample and the prediction points the other way.
_GIVEN_SIGMA = ("AuraFlow", "Chroma", "Flux", "LongCatImage", "OvisImage", "QwenImage")
_REVERSED = ("Lumina", "Mochi", "ZImage")


class Denoising(nn.Module):
    """Predict noise or velocity of samples that were noised at random timesteps.

    x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε with ε normal and t uniform over the scheduler's training
    timesteps, and loss = mean over samples of mean |model(x_t, t) − y|², where y = ε for the
    prediction type "epsilon" (Ho et al., arXiv 2006.11239, equation 14),
    y = √ᾱ_t · ε − √(1 − ᾱ_t) · x for "v_prediction" (Salimans and Ho, arXiv 2202.00512, appendix
    D) and y = x for "sample". With a flow-matching scheduler x_t = (1 − σ) · x + σ · ε and
    y = ε − x (Esser et al., arXiv 2403.03206, section 2); the transformers of Flux, Chroma,
    QwenImage, AuraFlow, OvisImage and LongCatImage are given σ as the timestep, others T · σ. The
    loss is computed in float32, or in float64 where the samples are.

    Of a model that predicts variances as well, with twice as many channels, the first half counts.
    It owns no weights. "features" has "mid", the output of a UNet's middle block: (B, channels,
    height, width).

    Args:
        scheduler: a scheduler of diffusers such as DDPMScheduler or
            FlowMatchEulerDiscreteScheduler, with the settings that the model was pretrained with.
        density: of which timesteps are drawn: "uniform", or for flows "logit_normal".
        prior_weight: λ of prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): by what
            the losses of samples marked as `prior`, such as pictures that the base model made, are
            multiplied.
        snr_gamma: γ of Min-SNR-γ (arXiv 2303.09556), which weighs the samples' losses by their
            timesteps; None: all alike. Its authors take 5. Not for flows.

    Raises:
        ValueError: the scheduler cannot be used for training, λ < 0 or γ ≤ 0; when called, the
            prediction's shape is not the sample's, features of a model without a middle block, a
            model that embeds a guidance scale and is given none, or one whose time is reversed.
        TypeError: when called, the model returns no sample.

    Example:
        >>> objective = Denoising(DDPMScheduler())
        >>> batch = objective.draw({"sample": latents, "encoder_hidden_states": texts})
        >>> objective(unet, **batch)["loss"].backward()
    """

    def __init__(
        self,
        scheduler: Any,
        density: Density = "uniform",
        prior_weight: float = 1.0,
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        if not prior_weight >= 0:
            raise ValueError(f"`prior_weight` must be at least 0, got {prior_weight!r}")
        self.noising = noising(scheduler, density, snr_gamma)
        self.prior_weight = prior_weight

    def draw(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with "noise" and "timesteps", each drawn unless it is there already.

        Args:
            batch: "sample" (B, ...) and what else `forward` takes.
        """
        sample, drawn = batch["sample"], dict(batch)
        if drawn.get("noise") is None:
            drawn["noise"] = torch.randn_like(sample)
        if drawn.get("timesteps") is None:
            drawn["timesteps"] = self.noising.timesteps(len(sample), sample.device)
        return drawn

    def forward(
        self,
        model: nn.Module,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        prior: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        features: bool = False,
        **conditioning: Any,
    ) -> dict[str, Any]:
        """Return the prediction as logits (B, C, height, width), the loss, features if asked for.

        Args:
            model: a UNet or DiT of diffusers; as it comes from DDP, FSDP, torch.compile or PEFT.
            sample: clean images or latents as the model was pretrained on, (B, C, height, width),
                or in another form that the model takes, such as Flux's (B, L, C).
            noise: like `sample`; None: drawn.
            timesteps: (B,), as the scheduler counts them; None: drawn.
            prior: booleans, (B,): samples of prior preservation; None: there are none.
            num_items_in_batch: by what the sum of the samples' losses is divided; default: B.
            features: return the output of the UNet's middle block as well.
            **conditioning: what else the model takes, such as encoder_hidden_states (B, L, D),
                class_labels (B,), SDXL's added_cond_kwargs or Flux's guidance (B,).
        """
        self._check(base_of(model), conditioning)
        drawn = self.draw({"sample": sample, "noise": noise, "timesteps": timesteps})
        noise, timesteps = at_least_float32(drawn["noise"]), drawn["timesteps"]
        exact = at_least_float32(sample)
        noised = self.noising.noised(exact, noise, timesteps).to(sample.dtype)
        tap = taps.tap_output(self._middle(model, features))
        with tap.switched(features):
            output = model(noised, timestep=self._as_taken(model, timesteps), **conditioning)
        prediction = self._without_variance(tensor_of(output, "sample", model), sample)
        result: dict[str, Any] = {"logits": prediction}
        if features:
            result["features"] = {"mid": tap.take()}
        error = at_least_float32(prediction) - self.noising.target(exact, noise, timesteps)
        losses = error.square().flatten(1).mean(1)  # (B,)
        weights = self.noising.weights(timesteps)
        if weights is not None:
            losses = losses * weights.to(losses)
        if prior is not None:
            losses = torch.where(prior.to(losses.device), self.prior_weight * losses, losses)
        items = len(sample) if num_items_in_batch is None else num_items_in_batch
        result["loss"] = divided(losses.sum(), items)
        return result

    def items(self, batch: Mapping[str, Any]) -> int:
        """Return the number of samples in a batch."""
        return len(batch["sample"])

    def _check(self, base: nn.Module, conditioning: Mapping[str, Any]) -> None:
        name = type(base).__name__
        if name.startswith(_REVERSED):
            raise ValueError(
                f"time runs from noise to sample in {name}, and it predicts the sample "
                "less the noise: there is no ready-made objective for it"
            )
        config: Any = getattr(base, "config", None)
        if getattr(config, "guidance_embeds", False) and conditioning.get("guidance") is None:
            raise ValueError(
                f"{name} embeds a guidance scale: give `guidance`, one number a sample, (B,). "
                "diffusers' training scripts take 1 to 3.5"
            )

    def _as_taken(self, model: nn.Module, timesteps: torch.Tensor) -> torch.Tensor:
        if type(base_of(model)).__name__.startswith(_GIVEN_SIGMA):
            return timesteps / self.noising.scheduler.config.num_train_timesteps
        return timesteps

    def _without_variance(self, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if prediction.shape[1] == 2 * sample.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]
        if prediction.shape != sample.shape:
            raise ValueError(
                f"the model's prediction has the shape {tuple(prediction.shape)}, the sample "
                f"{tuple(sample.shape)}; give samples as the model was pretrained on"
            )
        return prediction

    def _middle(self, model: nn.Module, needed: bool) -> nn.Module | None:
        base = base_of(model)
        middle = getattr(base, "mid_block", None)
        if middle is None and needed:
            raise ValueError(
                f"{type(base).__name__} has no mid_block to take features from; features are there "
                "for UNets that have one"
            )
        return middle
