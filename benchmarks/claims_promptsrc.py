"""The claims of PromptSRC on the embedded CLIP: what its prompts gain, and what keeps them honest.

    python benchmarks/claims_promptsrc.py

Claims, of the paper's tables 1 and 3 (arXiv 2307.06948) in the words of this benchmark:

1. the same deep prompts without regularizers gain on base classes and lose on novel ones against
   zero-shot;
2. PromptSRC's novel accuracy is at least the unregularized prompts', and its harmonic mean is
   the highest of zero-shot, deep prompts, LoRA, FLoRA and PromptSRC;
3. each of its parts alone (text, image, logits, averaging) helps the harmonic mean.

A claim that the numbers do not bear out is printed as not holding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from claims import RESULTS, Claim, Variant, difference, paired, report, superior, test_scores
from peft import LoraConfig
from torch import nn

import graftune

# The task's template has three words before the name; prompts in all blocks of both towers.
PROMPTS = {"init_text": "a picture of", "num_tokens_text": 3, "depth_text": 3, "depth_vision": 5}
DEEP, FULL = "deep prompts", "PromptSRC"


def prompts(*regularizers: Any) -> Callable[[nn.Module, Any], nn.Module]:
    """Attach deep prompts with regularizers."""

    def wrap(base: nn.Module, processor: Any) -> nn.Module:
        return graftune.wrap(
            base, "promptsrc", tokenizer=processor, regularizers=regularizers, **PROMPTS
        )

    return wrap


def averaging(epochs: int) -> graftune.GaussianAveraging:
    """The paper's mean and width for 20 epochs, on as many as there are."""
    return graftune.GaussianAveraging(mean=15 / 20 * epochs, std=1)


def only(**weights: float) -> graftune.SelfRegulation:
    """Self-regulation with all weights zero but those given."""
    off = {"text_weight": 0.0, "image_weight": 0.0, "logits_weight": 0.0}
    return graftune.SelfRegulation(**{**off, **weights})


def variants(epochs: int) -> list[Variant]:
    """All that is compared; parts and whole share the rate of the unregularized prompts."""
    rates = (3e-3, 1e-2, 3e-2)
    whole = graftune.SelfRegulation()
    return [
        Variant(DEEP, prompts(), rates),
        Variant("LoRA", lambda base, _: graftune.wrap(base, LoraConfig(r=4)), (3e-4, 1e-3, 3e-3)),
        Variant("FLoRA", lambda base, _: graftune.wrap(base, "flora", r=8), (1e-3, 3e-3, 1e-2)),
        Variant(FULL, prompts(whole, averaging(epochs)), rates),
        Variant("prompts + text", prompts(only(text_weight=25.0)), of=DEEP),
        Variant("prompts + image", prompts(only(image_weight=10.0)), of=DEEP),
        Variant("prompts + logits", prompts(only(logits_weight=1.0)), of=DEEP),
        Variant("prompts + averaging", prompts(averaging(epochs)), of=DEEP),
        Variant("prompts + self-regulation", prompts(whole), of=DEEP),
    ]


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The claims, judged by the means over the seeds."""

    def better(text: str, one: str, other: str, measured: str) -> Claim:
        return superior(text, (measured, paired(rows, one, other, measured)))

    kept = paired(rows, FULL, DEEP, "novel")
    rivals = ("zero-shot", DEEP, "LoRA", "FLoRA", FULL)
    means = {name: statistics.mean(test_scores(rows, name, "harmonic mean")) for name in rivals}
    best = max(means, key=lambda name: means[name])
    listed = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    found = [
        better("deep prompts gain on base classes against zero-shot", DEEP, "zero-shot", "base"),
        superior(
            "deep prompts lose on novel classes against zero-shot",
            ("lost on novel", paired(rows, "zero-shot", DEEP, "novel")),
        ),
        Claim(
            "PromptSRC's mean novel accuracy is at least the prompts'",
            statistics.mean(kept) >= 0,
            f"novel {difference(kept)}",
        ),
        Claim("PromptSRC has the highest harmonic mean", best == FULL, listed),
    ]
    for part in ("text", "image", "logits", "averaging"):
        one = f"prompts + {part}"
        found.append(better(f"{part} alone helps", one, DEEP, "harmonic mean"))
    return found


if __name__ == "__main__":
    report(__doc__, RESULTS / "claims_promptsrc.json", variants, claims)
