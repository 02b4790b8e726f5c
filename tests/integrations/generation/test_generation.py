"""Distances between sets of images, how they fit texts, and one number of both."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn

from embedded.model import load_clip
from embedded.pictures import load_style
from graftune.integrations.generation import (
    ClipImageFeatures,
    clip_score,
    image_distances,
    picture_agreement,
    visual_linguistic_harmony,
)


class Projection(nn.Module):
    """Five random projections of small images."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3 * 4 * 4, 5, generator=generator, dtype=torch.float64)
        self.register_buffer("weight", weight / 500)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).to(torch.float64) @ self.weight


def noise(count: int, seed: int, most: int = 256) -> list[Image.Image]:
    """Random images of 4 × 4 pixels."""
    drawn = np.random.default_rng(seed).integers(0, most, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def features_of(images: list[Image.Image]) -> np.ndarray:
    """What the projection says of images."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return Projection()(pixels.permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def features() -> ClipImageFeatures:
    return ClipImageFeatures(*load_clip())


def test_distances_are_what_their_formulas_say() -> None:
    generated, real = noise(130, 1), noise(70, 2, most=128)
    found = image_distances(generated, real, Projection())
    x, y = features_of(generated), features_of(real)
    means = np.square(x.mean(0) - y.mean(0)).sum()
    a, b = np.cov(x.T), np.cov(y.T)
    expected = means + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert found["fid"] == pytest.approx(expected, rel=1e-5)

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / 5 + 1) ** 3

    alike = image_distances(real, noise(70, 3), Projection())["kid"]
    z, n = features_of(noise(70, 3)), 70
    within = sum((kernel(s, s).sum() - np.trace(kernel(s, s))) / (n * (n - 1)) for s in (y, z))
    expected = 1000 * (within - 2 * kernel(y, z).mean())
    assert alike == pytest.approx(expected, rel=1e-4)


def test_distances_leave_the_random_numbers_alone_and_repeat() -> None:
    generated, real = noise(9, 1), noise(12, 2)
    state = torch.get_rng_state()
    first = image_distances(generated, real, Projection())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert image_distances(generated, real, Projection()) == first


def test_fewer_than_two_images_are_refused() -> None:
    with pytest.raises(ValueError, match="two images in each, got 1 generated and 3 real"):
        image_distances(noise(1, 0), noise(3, 0), Projection())


def test_a_clip_tells_styles_and_names_apart(features: ClipImageFeatures) -> None:
    style, other = load_style("noto"), load_style("openmoji")
    images = [Image.fromarray(image) for image in style.images[:96]]
    far = [Image.fromarray(image) for image in other.images[:96]]
    halves = image_distances(images[::2], images[1::2], features)
    apart = image_distances(images[::2], far[::2], features)
    assert halves["kid"] < apart["kid"]
    assert halves["fid"] < apart["fid"]

    names = style.names[:96]
    right, wrong = clip_score(images, names, features), clip_score(images, names[::-1], features)
    assert 100 >= right > wrong + 10
    assert picture_agreement(images, images, features) == pytest.approx(100, abs=1e-3)
    assert picture_agreement(images, images[::-1], features) < 90


def test_features_have_a_mean_square_of_one(features: ClipImageFeatures) -> None:
    pixels = torch.from_numpy(load_style("noto").images[:3]).permute(0, 3, 1, 2)
    found = features(pixels)
    assert found.shape == (3, features.num_features)
    torch.testing.assert_close(found.square().mean(1), torch.ones(3))


def test_unequal_numbers_are_refused(features: ClipImageFeatures) -> None:
    with pytest.raises(ValueError, match="one text an image, at least one: got 2 and 1"):
        clip_score(noise(2, 0), ["dog"], features)
    with pytest.raises(ValueError, match="pairs of images, at least one: got 2 and 1"):
        picture_agreement(noise(2, 0), noise(1, 0), features)


def test_the_index_adds_both_shares() -> None:
    fid, clip = {"a": 100.0, "b": 150.0, "c": 125.0}, {"a": 27.0, "b": 27.5, "c": 28.0}
    found = visual_linguistic_harmony(fid, clip)
    assert found == {"a": 1.0, "b": 0.5, "c": 1.5}
    assert visual_linguistic_harmony({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 3.0}) == {
        "a": 0.0,
        "b": 1.0,
    }
    with pytest.raises(ValueError, match="compares methods, two at least"):
        visual_linguistic_harmony({"a": 1.0}, {"a": 1.0})
