"""Measure the embedded CLIP: names and subcategories in seen, near and far styles.

    python examples/pretraining/evaluate_clip.py

Prints a table and the bars, and writes `evaluation.json` and the table of the model card beside the
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run as files, not modules

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from embedded.model import CLIP, load_clip
from embedded.pictures import FAR, NEAR, SEEN, Style, all_emoji, load_style, subcategory_text
from embedded.task import TextFeatures, accuracy, features_of, prompts

LEAST_EMOJI = 8  # subcategories with fewer are left out of the subcategory measurement
BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"


def large_subcategories() -> list[str]:
    """Subcategories with enough emoji to be measured."""
    sizes = Counter(emoji.subcategory for emoji in all_emoji())
    return sorted(name for name, size in sizes.items() if size >= LEAST_EMOJI)


def name_accuracy(images: Tensor, style: Style, names: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy among the names of all emoji, in percent."""
    best = (F.normalize(images, dim=-1) @ F.normalize(names, dim=-1).T).topk(5).indices
    right = best == torch.tensor([e.index for e in style.emoji])[:, None]
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(1).float().mean().item()


def subcategory_accuracy(images: Tensor, style: Style, text_features: TextFeatures) -> float:
    """Class-balanced accuracy among the large subcategories, in percent."""
    kinds = large_subcategories()
    rows = [i for i, name in enumerate(style.subcategories) if name in kinds]
    labels = torch.tensor([kinds.index(style.subcategories[i]) for i in rows])
    return accuracy(images[rows], text_features(prompts(map(subcategory_text, kinds))), labels)


def evaluate(folder: Path) -> dict[str, Any]:
    """All measurements, style by style, and their means over the seen styles."""
    model, processor = load_clip(folder)
    image_features, text_features = features_of(model, processor)
    names = text_features(prompts(emoji.name for emoji in all_emoji()))
    rows: dict[str, dict[str, float]] = {}
    for name in (*SEEN, NEAR, FAR):
        style = load_style(name)
        images = image_features(style.images)
        first, five = name_accuracy(images, style, names)
        kind = subcategory_accuracy(images, style, text_features)
        rows[name] = {"name top-1": first, "name top-5": five, "subcategory": kind}
    seen = {key: sum(rows[s][key] for s in SEEN) / len(SEEN) for key in rows[NEAR]}
    size = (folder / "model.safetensors").stat().st_size / 1e6
    bars = {
        "size of the weights <= 12 MB": (size, size <= 12),
        "name top-1 in seen styles >= 55 %": (seen["name top-1"], seen["name top-1"] >= 55),
        f"name top-5 in {NEAR} >= 60 %": (rows[NEAR]["name top-5"], rows[NEAR]["name top-5"] >= 60),
        f"name top-5 in {FAR} >= 18 %": (rows[FAR]["name top-5"], rows[FAR]["name top-5"] >= 18),
    }
    return {
        "styles": rows,
        "mean of seen styles": seen,
        "bars": {key: {"value": value, "reached": ok} for key, (value, ok) in bars.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "subcategories": len(large_subcategories()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table, and the bars under it."""
    shown = {name: result["styles"][name] for name in SEEN}
    shown["**mean of the seen styles**"] = result["mean of seen styles"]
    shown[f"{NEAR} (near, never seen)"] = result["styles"][NEAR]
    shown[f"{FAR} (far, never seen)"] = result["styles"][FAR]
    kinds = f"subcategory, one of {result['subcategories']}"
    lines = [f"| style | name top-1 | name top-5 | {kinds} |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['name top-1']:.1f} | {row['name top-5']:.1f} | {row['subcategory']:.1f} |"
        for name, row in shown.items()
    ]
    lines.append("")
    for bar, found in result["bars"].items():
        lines.append(
            f"- {bar}: {found['value']:.1f}, {'reached' if found['reached'] else 'missed'}"
        )
    return "\n".join(lines)


def update_card(card: Path, text: str) -> None:
    """Replace what stands between the two marks of the model card."""
    old = card.read_text()
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    card.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CLIP)
    folder = parser.parse_args().model
    result = evaluate(folder)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    print(text)
    if (folder / "README.md").exists():
        update_card(folder / "README.md", text)


if __name__ == "__main__":
    main()
