"""Measure the embedded UNet: does it draw what it is told, in its style?

    python examples/pretraining/evaluate_unet.py

Draws every emoji that it was pretrained on, each from noise of its own. Prints a table and the
bars, and writes `evaluation.json`, the table of the model card and a grid of samples beside the
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run as files, not modules

import diffusers
import numpy as np
import torch
from evaluate_clip import update_card
from PIL import Image

from embedded.diffusion import STYLE, UNET, drawn, grid, load_pipeline
from embedded.model import load_clip
from embedded.pictures import FAR, all_emoji
from embedded.task import prompts
from graftune.integrations.generation import ClipImageFeatures, clip_score, image_distances
from graftune.integrations.libraries.towers import encode_texts, tokenize

Images = list[Image.Image]
SHOWN = 48  # samples in the grid


def pictures(style: str) -> Images:
    """What the UNet draws, in some style."""
    return [Image.fromarray(image) for image in drawn(style)[0]]


def noise(count: int) -> Images:
    """Pictures of nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@torch.no_grad()
def top_five(images: Images, names: list[str], features: ClipImageFeatures) -> float:
    """Return how often a picture's name is among the CLIP's five best of all emoji, in percent."""
    told = [emoji.name for emoji in all_emoji()]
    tokens = tokenize(features.model, features.processor, prompts(told))
    scores = features.directions(images) @ encode_texts(features.model, tokens).T
    right = scores.topk(5).indices == torch.tensor([told.index(name) for name in names])[:, None]
    return 100 * right.any(1).float().mean().item()


def evaluate(folder: Path) -> tuple[dict[str, Any], Images]:
    """All measurements, and the samples."""
    features = ClipImageFeatures(*load_clip())
    pipeline = load_pipeline(folder)
    names, real = drawn()[1], pictures(STYLE)
    samples = pipeline(names)

    def measured(images: Images, texts: list[str] | None) -> dict[str, float]:
        row = image_distances(images, real, features)
        if texts is not None:
            row |= {"top-5": top_five(images, texts, features)}
            row |= {"CLIP score": clip_score(images, prompts(texts), features)}
        return row

    rows = {
        "samples": measured(samples, names),
        f"the pictures themselves ({STYLE})": measured(real, names),
        f"another style ({FAR})": measured(pictures(FAR), drawn(FAR)[1]),
        "noise": measured(noise(len(real)), None),
    }
    ours, _, other, nothing = (row["fid"] for row in rows.values())
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    top = rows["samples"]["top-5"]
    bars = {
        "size of the weights <= 12 MB": (size, size <= 12),
        "name in the CLIP's top 5 of all emoji in >= 50 % of samples": (top, top >= 50),
        f"FID of samples over that of {FAR} <= 0.5": (ours / other, ours / other <= 0.5),
        "FID of samples over that of noise <= 0.1": (ours / nothing, ours / nothing <= 0.1),
    }
    result = {
        "rows": rows,
        "bars": {key: {"value": value, "reached": ok} for key, (value, ok) in bars.items()},
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "pictures": len(real),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    return result, samples


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table, and the bars under it."""
    columns = ("top-5", "CLIP score", "fid", "kid")
    lines = ["| | name in top 5 of 1,898, % | CLIP score | FID | KID |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        cells = (f"{row[column]:.1f}" if column in row else "" for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines[0] = lines[0].replace("1,898", f"{len(all_emoji()):,}")
    lines.append("")
    for bar, found in result["bars"].items():
        lines.append(
            f"- {bar}: {found['value']:.2f}, {'reached' if found['reached'] else 'missed'}"
        )
    return "\n".join(lines)


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=UNET)
    folder = parser.parse_args().model
    result, samples = evaluate(folder)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    spread = np.linspace(0, len(samples) - 1, SHOWN).round().astype(int)
    grid([samples[i] for i in spread], columns=12).save(folder / "samples.png", optimize=True)
    text = table(result)
    print(text)
    if (folder / "README.md").exists():
        update_card(folder / "README.md", text)


if __name__ == "__main__":
    main()
