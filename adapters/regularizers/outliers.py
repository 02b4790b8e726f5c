"""Virtual outliers: points beyond a class's boundary in feature space, and a loss that uses them.

The mathematics of OVOR (One Prompt with Virtual Outlier Regularization, arXiv 2402.04129, section
3.2), which takes its outliers from Non-Parametric Outlier Synthesis (arXiv 2303.02966, section 3).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graftune.adapters.base.messages import warn_once
from graftune.adapters.base.precision import at_least_float32

Center = Literal["boundary", "origin"]

_CHUNK = 2**22  # distances that exist at a time
_GATHERED = 2**20  # the same where they are only looked at once, and the cache should hold them


def kth_distance(points: Tensor, features: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each point to its K-th nearest feature.

    A point that is a feature itself counts as its own first neighbour, at distance 0.

    Args:
        points: (P, D).
        features: (N, D), N ≥ K.
        neighbours: K ≥ 1.

    Returns:
        (P,). At most some four million distances are in memory at a time.

    Example:
        >>> kth_distance(torch.zeros(1, 1), torch.tensor([[1.0], [-2.0], [4.0]]), neighbours=2)
        tensor([2.])
    """
    rows = max(1, _CHUNK // len(features))
    nearest = [
        torch.cdist(chunk, features).kthvalue(neighbours, dim=1).values
        for chunk in points.split(rows)
    ]
    return torch.cat(nearest)  # (P,)


def virtual_outliers(
    features: Tensor,
    *,
    neighbours: int = 50,
    select: int = 50,
    samples: int = 600,
    sigma: float = 0.1,
    per_class: int = 40,
    center: Center = "boundary",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return points outside of what the features of a class take up.

    The `select` features with the largest distance to their K-th neighbour are the class's
    boundary. Around each of them x, `samples` candidates x + σ n_j are drawn, n_j ~ N(0, 1), with
    the same n_j around all of them; of all candidates those with the largest distance to their K-th
    neighbour among the features are kept (arXiv 2402.04129, section 3.2). A feature is its own
    first neighbour.

    `center="origin"` is what the authors' code does instead: the candidates are σ n_j, each of them
    `select` times, and neighbours are looked for among the features divided by their norms.

    Args:
        features: of one class, (N, D), or of several classes of as many images, (C, N, D).
        neighbours: K ≥ 1; with fewer features it shrinks to their number, and so does `select`.
        select: boundary features, at least 1.
        samples: candidates around each, at least 1.
        sigma: σ > 0.
        per_class: outliers to keep, at most `select` · `samples`.
        center: "boundary" (the paper) or "origin" (as released).
        generator: draws the n_j of one class after the other, (samples, D) each; on the features'
            device. None takes torch's own.

    Returns:
        (per_class, D) or (C, per_class, D), the farthest first, without gradient.

    Raises:
        ValueError: no features, features that are not finite, or a setting out of range.

    Example:
        >>> virtual_outliers(torch.randn(100, 768)).shape
        torch.Size([40, 768])
    """
    check_settings(neighbours, select, samples, sigma, per_class, center)
    if features.ndim == 3:
        drawn = [
            virtual_outliers(
                of_class,
                neighbours=neighbours,
                select=select,
                samples=samples,
                sigma=sigma,
                per_class=per_class,
                center=center,
                generator=generator,
            )
            for of_class in features
        ]
        return torch.stack(drawn)
    _check_features(features)
    features = at_least_float32(features.detach())
    count, width = features.shape
    if count < max(neighbours, select):
        warn_once(
            "virtual outliers: few features",
            f"a class has {count} features, fewer than neighbours={neighbours} or select={select}: "
            f"both are taken as {count} at most for such classes",
        )
        neighbours, select = min(neighbours, count), min(select, count)
    if per_class > select * samples:
        raise ValueError(
            f"per_class={per_class} outliers cannot be kept of {select} boundary features times "
            f"samples={samples} candidates; give fewer, or more samples"
        )
    noise = torch.randn(
        samples, width, dtype=features.dtype, device=features.device, generator=generator
    )
    if center == "origin":
        return _around_origin(features, sigma * noise, neighbours, select, per_class)
    return _around_boundary(features, sigma * noise, neighbours, select, per_class)


def _around_origin(
    features: Tensor, noise: Tensor, neighbours: int, select: int, per_class: int
) -> Tensor:
    distances = kth_distance(noise, F.normalize(features, dim=1), neighbours)
    distinct = min(-(-per_class // select), len(noise))
    farthest = distances.topk(distinct).indices.repeat_interleave(select)
    return noise[farthest[:per_class]]


def _around_boundary(
    features: Tensor, noise: Tensor, neighbours: int, select: int, per_class: int
) -> Tensor:
    """Keep the farthest of all boundary features plus all noise, without computing all distances.

    The distance of x + n to its K-th neighbour is at most the largest of its distances to the K
    neighbours of x. Only candidates for which this bound is high enough are looked at closely.
    """
    # Distances do not change when everything is moved; small numbers keep more digits of them.
    features = features - (middle := features.mean(0))
    to_features = torch.cdist(features, features)  # (N, N)
    own = to_features.topk(neighbours, largest=False)  # (N, K), the farthest last
    boundary = own.values[:, -1].topk(select).indices  # (S,)
    bounds = _bounds(features, noise, boundary, to_features, own.indices[boundary])  # (S, samples)
    bounds = bounds.flatten()

    def candidates(which: Tensor) -> Tensor:
        return features[boundary[which // len(noise)]] + noise[which % len(noise)]

    first = bounds.topk(min(4 * per_class, len(bounds))).indices
    distances = kth_distance(candidates(first), features, neighbours)
    threshold = distances.topk(per_class).values[-1]
    # A bound and a distance are computed in different ways: leave room for their rounding.
    slack = 16 * torch.finfo(bounds.dtype).eps * (threshold + to_features.max())
    open_ = bounds >= threshold - slack
    open_[first] = False
    rest = open_.nonzero().squeeze(1)
    distances = torch.cat([distances, kth_distance(candidates(rest), features, neighbours)])
    farthest = torch.cat([first, rest])[distances.topk(per_class).indices]
    return candidates(farthest) + middle


def _bounds(
    features: Tensor, noise: Tensor, boundary: Tensor, to_features: Tensor, near: Tensor
) -> Tensor:
    """Return the largest distance of each candidate to the K neighbours of its boundary feature.

    ‖x + n − f‖² = ‖x − f‖² + ‖n‖² + 2 n·x − 2 n·f, with one product for all x and f.

    Args:
        features: (N, D).
        noise: (samples, D).
        boundary: the places of the boundary features x, (S,).
        to_features: distances of all features, (N, N).
        near: the places of the K neighbours of each x, (S, K).

    Returns:
        (S, samples).
    """
    along = -2 * features @ noise.T  # (N, samples)
    apart = to_features[boundary].square().gather(1, near)  # (S, K)
    # Many boundary features at once: where other work has the cores, each of many small operations
    # waits longer for its threads than it takes.
    rows = max(1, _GATHERED // (near.shape[1] * len(noise)))
    pairs = zip(apart.split(rows), near.split(rows), strict=True)
    largest = torch.cat([along[places].add_(d[..., None]).amax(1) for d, places in pairs])
    bounds = largest + noise.square().sum(1) - along[boundary]  # (S, samples)
    return bounds.clamp_(min=0).sqrt_()


def outlier_loss(
    inside_logits: Tensor,
    outside_logits: Tensor,
    *,
    weight: float = 0.1,
    inside_energy: float = -15.0,
    outside_energy: float = -3.0,
    huber: bool = True,
) -> Tensor:
    """Return w · [mean h(max(0, E_in − m_in)) + mean h(max(0, m_out − E_out))].

    E = −log Σ_c exp(z_c) is the energy of a feature by the logits of the *current* task's classes:
    at most m_in for features of images, at least m_out for outliers. h is Huber's function with
    δ = 1 (arXiv 2402.04129, section 3.2; the energies of arXiv 2010.03759).

    Args:
        inside_logits: (B, C) of images, the C classes of the current task.
        outside_logits: (M, C) of outliers.
        weight: w ≥ 0.
        inside_energy: m_in.
        outside_energy: m_out.
        huber: False takes h(x) = x².

    Example:
        >>> outlier_loss(torch.full((2, 3), 20.0), torch.full((2, 3), -20.0))
        tensor(0.)
    """
    inside = too_high(inside_logits, inside_energy, huber)  # (B,)
    outside = too_low(outside_logits, outside_energy, huber)  # (M,)
    return weight * (inside.mean() + outside.mean())


def too_high(logits: Tensor, energy: float, huber: bool = True) -> Tensor:
    """Return h(max(0, E − m)) of each row of logits: (B, C) to (B,)."""
    return _penalty((-at_least_float32(logits).logsumexp(-1) - energy).relu(), huber)


def too_low(logits: Tensor, energy: float, huber: bool = True) -> Tensor:
    """Return h(max(0, m − E)) of each row of logits: (M, C) to (M,)."""
    return _penalty((energy + at_least_float32(logits).logsumexp(-1)).relu(), huber)


def _penalty(excess: Tensor, huber: bool) -> Tensor:
    distance = F.huber_loss if huber else F.mse_loss
    return distance(excess, torch.zeros_like(excess), reduction="none")


def check_settings(
    neighbours: int, select: int, samples: int, sigma: float, per_class: int, center: str
) -> None:
    """Raise ValueError where a setting of `virtual_outliers` is out of range."""
    counts = {
        "neighbours": neighbours,
        "select": select,
        "samples": samples,
        "per_class": per_class,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if not sigma > 0:
        raise ValueError(f"`sigma` must be greater than 0, got {sigma!r}")
    if center not in ("boundary", "origin"):
        raise ValueError(f"`center` is 'boundary' or 'origin', got {center!r}")
    if per_class > select * samples:
        raise ValueError(
            f"per_class={per_class} is more than the select={select} times samples={samples} "
            "candidates of a class"
        )


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or not features.numel():
        raise ValueError(
            "features must be (images of a class, width) or (classes, images, width), with at "
            f"least one image; got {tuple(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite; some are NaN or infinite")
