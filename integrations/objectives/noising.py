"""How samples are noised in training, and what a model then predicts: diffusion and flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from graftune.adapters.base.messages import listing

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Density = Literal["uniform", "logit_normal"]


class Noising(Protocol):
    """A way of noising samples x with noise ε at timesteps t."""

    @property
    def scheduler(self) -> Any:
        """The scheduler that says how."""
        ...

    def timesteps(self, count: int, device: torch.device) -> Tensor:
        """Draw timesteps as the model takes them: (count,)."""
        ...

    def noised(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t, of the shape of the sample."""
        ...

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the model predicts, of the shape of the sample."""
        ...

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Return by what the samples' losses are multiplied, (count,); None where by nothing."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε, of which ε, the velocity or x is predicted.

    Args:
        scheduler: of diffusers, made for training.
        density: "uniform".
        snr_gamma: γ of min-SNR weights, or None.
    """

    scheduler: Any
    density: Density = "uniform"
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        name, config = type(self.scheduler).__name__, getattr(self.scheduler, "config", None)
        prediction_type = getattr(config, "prediction_type", None)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"{name} has the prediction type {prediction_type!r}; allowed are "
                f"{listing(PREDICTION_TYPES)}: give the scheduler that the model was pretrained "
                "with"
            )
        # Sampling schedulers such as Euler's noise by σ, and only at their own few timesteps.
        made_for_it = hasattr(self.scheduler, "get_velocity")
        if not made_for_it or float(self.scheduler.init_noise_sigma) != 1:
            raise ValueError(
                f"{name} is made for sampling, not for noising at any timestep; give "
                "DDPMScheduler.from_config(scheduler.config), or another like DDPMScheduler"
            )
        if self.density != "uniform":
            raise ValueError(
                f"`density` {self.density!r} is for flows; timesteps of diffusion are 'uniform'"
            )

    def timesteps(self, count: int, device: torch.device) -> Tensor:
        """Draw whole numbers, uniform over the training timesteps."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), device=device)

    def noised(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noised sample."""
        return self.scheduler.add_noise(sample, noise, timesteps)

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ε, √ᾱ_t · ε − √(1 − ᾱ_t) · x, or x."""
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return sample
        return self.scheduler.get_velocity(sample, noise, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Return min(SNR, γ) of each timestep in terms of what is predicted; None without γ."""
        if self.snr_gamma is None:
            return None
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        kind: Any = self.scheduler.config.prediction_type
        return min_snr_weights(alphas, self.snr_gamma, kind)


def min_snr_weights(
    alphas: Tensor, gamma: float, prediction_type: Literal["epsilon", "v_prediction", "sample"]
) -> Tensor:
    """Return the weights of Min-SNR-γ (Hang et al., arXiv 2303.09556, section 3.4).

    With SNR = ᾱ / (1 − ᾱ): min(SNR, γ) for a predicted x, min(SNR, γ) / SNR for ε, and
    min(SNR, γ) / (SNR + 1) for the velocity, which all weigh one and the same error of x.

    Args:
        alphas: ᾱ_t, (B,), 0 to 1.
        gamma: γ > 0.
        prediction_type: what the model predicts.

    Returns:
        (B,), at least 0.

    Example:
        >>> min_snr_weights(torch.tensor([0.5, 0.9]), 5.0, "epsilon")
        tensor([1.0000, 0.5556])
    """
    snr = alphas / (1 - alphas)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # where the SNR is 0 as well
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


@dataclass(frozen=True)
class Flow:
    """x_t = (1 − σ) · x + σ · ε with σ = t / T, of which the velocity ε − x is predicted.

    Args:
        scheduler: a flow-matching scheduler of diffusers; its shift says which σ there are.
        density: of which of these are drawn, "uniform" or "logit_normal", the sigmoid of a normal
            number (Esser et al., arXiv 2403.03206, section 3.1).
    """

    scheduler: Any
    density: Density = "uniform"

    def __post_init__(self) -> None:
        if self.density not in ("uniform", "logit_normal"):
            raise ValueError(f"`density` is 'uniform' or 'logit_normal', got {self.density!r}")
        # One that is sampled with meanwhile has few timesteps; training takes all of them.
        fresh = type(self.scheduler).from_config(self.scheduler.config)
        object.__setattr__(self, "scheduler", fresh)

    def timesteps(self, count: int, device: torch.device) -> Tensor:
        """Draw from the scheduler's timesteps, real numbers up to T."""
        there: Tensor = self.scheduler.timesteps
        shares = (
            torch.rand(count, device=device)
            if self.density == "uniform"
            else torch.randn(count, device=device).sigmoid()
        )
        places = (shares * len(there)).long().clamp(max=len(there) - 1)
        return there.to(device)[places]

    def noised(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the point of the path from the sample to the noise."""
        sigmas = timesteps.to(sample.dtype) / self.scheduler.config.num_train_timesteps  # (B,)
        return torch.lerp(sample, noise, sigmas.view(-1, *[1] * (sample.ndim - 1)))

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ε − x."""
        return noise - sample

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Return None: flows choose by their density."""
        return None


def noising(
    scheduler: Any, density: Density = "uniform", snr_gamma: float | None = None
) -> Noising:
    """Return how a scheduler of diffusers noises samples.

    Raises:
        ValueError: it is made for sampling, its prediction type is not supported, or it does not
            have that density or min-SNR weights.
    """
    if snr_gamma is not None and not snr_gamma > 0:
        raise ValueError(f"`snr_gamma` must be above 0 or None, got {snr_gamma!r}")
    if hasattr(scheduler, "scale_noise") and hasattr(scheduler, "sigmas"):
        if snr_gamma is not None:
            raise ValueError(
                f"`snr_gamma` weighs diffusion's losses, and {type(scheduler).__name__} is of a "
                "flow: leave it out; density='logit_normal' draws more of the middle timesteps"
            )
        return Flow(scheduler, density)
    return Diffusion(scheduler, density, snr_gamma)
