"""Prediction of the noise in a noised sample, as diffusion models are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftune.adapters.messages import listing
from graftune.integrations.objectives import taps
from graftune.integrations.objectives.labels import divided
from graftune.integrations.objectives.unwrap import base_of, tensor_of

PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler of diffusers can noise samples for training, at any timestep.

    Raises:
        ValueError: its prediction type is not supported, or it scales samples by other factors
            than √ᾱ and √(1 − ᾱ).
    """
    name = type(scheduler).__name__
    prediction_type = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} has the prediction type {prediction_type!r}; allowed are "
            f"{listing(PREDICTION_TYPES)}: give the scheduler that the model was pretrained with"
        )
    # Sampling schedulers such as Euler's noise by σ instead, and only at their own few timesteps.
    if not hasattr(scheduler, "get_velocity") or float(scheduler.init_noise_sigma) != 1:
        raise ValueError(
            f"{name} is made for sampling, not for noising at any timestep; give "
            "DDPMScheduler.from_config(scheduler.config), or another like DDPMScheduler"
        )


class Denoising(nn.Module):
    """Predict the noise, or the velocity, in samples that were noised at random timesteps.

    x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε with ε normal and t uniform over the scheduler's training
    timesteps, and loss = mean over samples of mean |model(x_t, t) − y|², where y = ε for the
    prediction type "epsilon" (Ho et al., arXiv 2006.11239, equation 14) and
    y = √ᾱ_t · ε − √(1 − ᾱ_t) · x for "v_prediction" (Salimans and Ho, arXiv 2202.00512, appendix
    D). Of a model that predicts variances as well, with twice as many channels, the first half
    counts. It owns no weights. "features" has "mid", the output of a UNet's middle block:
    (B, channels, height, width).

    Args:
        scheduler: a scheduler of diffusers such as DDPMScheduler, with the settings that the model
            was pretrained with.

    Raises:
        ValueError: the scheduler cannot be used for training; when called, the prediction's shape
            is not the sample's, or features of a model without a middle block.
        TypeError: when called, the model returns no sample.

    Example:
        >>> objective = Denoising(DDPMScheduler())
        >>> batch = objective.draw({"sample": latents, "encoder_hidden_states": texts})
        >>> objective(unet, **batch)["loss"].backward()
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        check_scheduler(scheduler)
        self.scheduler = scheduler

    def draw(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with "noise" and "timesteps", each drawn unless it is there already.

        Args:
            batch: "sample" (B, ...) and what else `forward` takes.
        """
        sample, drawn = batch["sample"], dict(batch)
        if drawn.get("noise") is None:
            drawn["noise"] = torch.randn_like(sample)
        if drawn.get("timesteps") is None:
            steps = self.scheduler.config.num_train_timesteps
            drawn["timesteps"] = torch.randint(steps, sample.shape[:1], device=sample.device)
        return drawn

    def forward(
        self,
        model: nn.Module,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        features: bool = False,
        **conditioning: Any,
    ) -> dict[str, Any]:
        """Return the prediction as logits (B, C, height, width), the loss, features if asked for.

        Args:
            model: a UNet or DiT of diffusers; as it comes from DDP, FSDP, torch.compile or PEFT.
            sample: clean images or latents as the model was pretrained on, (B, C, height, width).
            noise: like `sample`; None: drawn.
            timesteps: (B,) in 0..num_train_timesteps-1; None: drawn.
            num_items_in_batch: by what the sum of the samples' losses is divided; default: B.
            features: return the output of the UNet's middle block as well.
            **conditioning: what else the model takes, such as encoder_hidden_states (B, L, D) or
                class_labels (B,).
        """
        drawn = self.draw({"sample": sample, "noise": noise, "timesteps": timesteps})
        noise, timesteps = drawn["noise"].float(), drawn["timesteps"]
        noised = self.scheduler.add_noise(sample.float(), noise, timesteps).to(sample.dtype)
        tap = taps.tap_output(self._middle(model, features))
        with tap.switched(features):
            output = model(noised, timestep=timesteps, **conditioning)
        prediction = self._without_variance(tensor_of(output, "sample", model), sample)
        result: dict[str, Any] = {"logits": prediction}
        if features:
            result["features"] = {"mid": tap.take()}
        error = prediction.float() - self._target(sample.float(), noise, timesteps)
        losses = error.square().flatten(1).mean(1)  # (B,)
        items = len(sample) if num_items_in_batch is None else num_items_in_batch
        result["loss"] = divided(losses.sum(), items)
        return result

    def items(self, batch: Mapping[str, Any]) -> int:
        """Return the number of samples in a batch."""
        return len(batch["sample"])

    def _target(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(sample, noise, timesteps)

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
