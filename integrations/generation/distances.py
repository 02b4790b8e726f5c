"""How far generated images are from real ones, as sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from graftune.integrations.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES_AT_A_TIME = 64
_SUBSETS, _LARGEST_SUBSET = 100, 1000


def image_distances(
    generated: Sequence[Image], real: Sequence[Image], features: nn.Module | int = 2048
) -> dict[str, float]:
    """Return the Fréchet and the kernel distance between generated and real images.

    "fid" = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of their features' means and covariances (Heusel
    et al., arXiv 1706.08500, section 2). It is too high for few images, so compare like with like.
    "kid" = 1000 · MMD² with the kernel (xᵀy/D + 1)³ (Bińkowski et al., arXiv 1801.01401, section
    4), which is not; the mean over 100 subsets of up to 1000 images, with 0 as their seed.

    torchmetrics computes both.

    Args:
        generated: images of one size.
        real: images of one size.
        features: what maps images (N, 3, height, width) in 0..255 to features (N, D), such as
            `ClipImageFeatures`; or the width of Inception's, 64, 192, 768 or 2048, which is
            downloaded and needs torch-fidelity.

    Raises:
        ImportError: torchmetrics, or for Inception torch-fidelity, is not installed.
        ValueError: fewer than two images on a side.
    """
    if min(len(generated), len(real)) < 2:
        raise ValueError(
            f"distances between sets need two images in each, got {len(generated)} generated and "
            f"{len(real)} real ones"
        )
    fid_of, kid_of = (require(f"torchmetrics.image.{name}", "metrics") for name in ("fid", "kid"))
    size = min(len(generated), len(real), _LARGEST_SUBSET)
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(0)
        fid = fid_of.FrechetInceptionDistance(features)
        kid = kid_of.KernelInceptionDistance(features, subsets=_SUBSETS, subset_size=size)
        for images, is_real in ((generated, False), (real, True)):
            for batch in _batches(images):
                fid.update(batch, real=is_real)
                kid.update(batch, real=is_real)
        return {"fid": fid.compute().item(), "kid": 1000 * kid.compute()[0].item()}


def _batches(images: Sequence[Image]) -> Iterator[Tensor]:
    for start in range(0, len(images), _IMAGES_AT_A_TIME):
        some = images[start : start + _IMAGES_AT_A_TIME]
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in some])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
