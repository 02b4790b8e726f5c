"""Augmentation of whole batches: small movements, other colours, and drawing by outlines.

Pictures are float tensors (B, 3, H, W) of *ink*, that is 1 - intensity: white is 0, so whatever is
moved, scaled or recoloured leaves a white background white.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(size: int, low: float, high: float) -> Tensor:
    """`size` numbers between low and high."""
    return torch.empty(size).uniform_(low, high)


def chosen(size: int, probability: float) -> Tensor:
    """A random mask, ready to broadcast over pictures."""
    return (torch.rand(size) < probability).view(-1, 1, 1, 1)


def move(ink: Tensor) -> Tensor:
    """Rotate, scale, stretch and shift a little. Never mirror: arrows have a direction."""
    n = len(ink)
    angle = uniform(n, -0.15, 0.15)
    zoom = torch.exp(uniform(n, math.log(0.9), math.log(1.3)))
    stretch = torch.exp(uniform(n, -0.12, 0.12))
    shift = uniform(2 * n, -0.08, 0.08).view(n, 2)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = torch.stack([cos * stretch, -sin, shift[:, 0], sin, cos / stretch, shift[:, 1]], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False, padding_mode="zeros")


def recolour(ink: Tensor) -> Tensor:
    """Turn hue, change saturation and strength, or drop colour altogether."""
    n = len(ink)
    weak = torch.where(torch.rand(n) < 0.85, 0.35, math.pi)  # mostly near hues, at times any
    hue = uniform(n, -1, 1) * weak
    hue = torch.where(torch.rand(n) < 0.6, hue, 0.0)
    saturation = torch.where(torch.rand(n) < 0.12, 0.0, uniform(n, 0.5, 1.5))
    # A rotation about the grey axis (1, 1, 1)/√3, by Rodrigues' formula, and a scale beside it.
    third = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = (f(hue).view(n, 1, 1) for f in (torch.cos, torch.sin))
    turn = cos * (torch.eye(3) - third) + sin * cross
    mix = third + saturation.view(n, 1, 1) * turn
    strength = uniform(n, 0.75, 1.25).view(n, 1, 1)
    return torch.einsum("nij,njhw->nihw", mix * strength, ink).clamp(0, 1)


def outline(ink: Tensor) -> Tensor:
    """Draw dark lines where the colour changes in some pictures, and bleach what lies between."""
    rows = (torch.rand(len(ink)) < 0.3).nonzero()[:, 0]
    some, n = ink[rows], len(rows)
    wide = torch.cat([some, some.mean(1, keepdim=True)], 1)
    edges = (F.max_pool2d(wide, 3, 1, 1) + F.max_pool2d(-wide, 3, 1, 1)).amax(1, keepdim=True)
    gain = uniform(n, 1.2, 4).view(-1, 1, 1, 1)
    lines = ((edges - 0.12) * gain).clamp(0, 1)
    fill = uniform(n, 0, 1).view(-1, 1, 1, 1)
    return ink.index_copy(0, rows, torch.maximum(some * fill, lines.expand_as(some)))


def soften(ink: Tensor) -> Tensor:
    """Blur some pictures."""
    smooth = F.avg_pool2d(ink, 3, 1, 1, count_include_pad=False)
    return torch.where(chosen(len(ink), 0.12), smooth, ink)


def tint(ink: Tensor) -> Tensor:
    """Put some pictures on coloured paper."""
    paper = torch.rand(len(ink), 3, 1, 1) * 0.5
    on_paper = 1 - (1 - ink) * (1 - paper)
    return torch.where(chosen(len(ink), 0.05), on_paper, ink)


def augment(pictures: Tensor, share: float = 1.0) -> Tensor:
    """uint8 pictures on white to model input in [-1, 1], the given share of them augmented."""
    ink = 1 - pictures.float() / 255
    changed = tint(soften(move(recolour(outline(ink)))))
    return 1 - 2 * torch.where(chosen(len(ink), share), changed, ink)


def plain(pictures: Tensor) -> Tensor:
    """uint8 pictures to model input in [-1, 1]."""
    return pictures.float() / 127.5 - 1
