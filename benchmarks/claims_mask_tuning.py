"""The claims of regularized mask tuning on the embedded CLIP: what switching weights off can do.

    python benchmarks/claims_mask_tuning.py

Claims, of the paper (arXiv 2307.15049, tables 1, 3 and 4) in the words of this benchmark:

1. masks gain on base classes against zero-shot, with a few percent of the weights switched off;
2. gradient dropout is better on novel classes than masks without it;
3. masks on top of deep prompts, and of LoRA, are better on base classes than those alone;
4. a check of the measurement: a mask gains less in a style that it was not tuned for.

Masks are on the patch embedding and all attention projections of the vision tower. On top means one
after the other: the first adapter is trained, then masks with the first one as it is. A claim that
the numbers do not bear out is printed as not holding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from claims import (
    RESULTS,
    Claim,
    Variant,
    paired,
    report,
    scores,
    superior,
    test_scores,
)
from claims_promptsrc import prompts
from peft import LoraConfig
from torch import nn

import graftune
from embedded.model import load_clip
from embedded.pictures import NEAR
from embedded.task import few_shot_task

# Adam, the paper's, moves all scores at much the same pace: within the hundred steps of this task
# they cross the threshold together or not at all. SGD moves each by its own gradient.
SGD_RATES, ADAM_RATES = (3e-2, 1e-1, 3e-1, 1.0), (1e-4, 3e-4, 1e-3)
MASKS, DROPOUT, ADAM = "masks", "masks + gradient dropout", "the same by Adam"
SAME_RATE = "the same at the rate of masks"
PROMPTS, LORA = "deep prompts", "LoRA"
OTHER_STYLE = "other style"


def masks(*regularizers: Any) -> Callable[[nn.Module, Any], nn.Module]:
    """Attach masks to the vision tower, with regularizers."""

    def wrap(base: nn.Module, _: Any) -> nn.Module:
        return graftune.wrap(base, "mask_tuning", targets="attention", regularizers=regularizers)

    return wrap


def share_masked(model: nn.Module) -> float:
    """Return the percentage of the weights with scores that are switched off."""
    found = [p for name, p in model.named_parameters() if "mask_tuning_" in name]
    off = sum(int((p <= 0.005).sum()) for p in found)
    return 100 * off / sum(p.numel() for p in found)


def more(model: nn.Module, processor: Any, seed: int, split: str) -> dict[str, float]:
    """Return the share masked, and the gain on base classes in a style not tuned for."""
    task = few_shot_task(seed=seed, style=NEAR)
    before, after = scores(*load_clip(), task, split), scores(model, processor, task, split)
    return {"masked": share_masked(model), OTHER_STYLE: after["base"] - before["base"]}


def variants(epochs: int) -> list[Variant]:
    """All that is compared; masks need nothing of the number of epochs."""
    norm = graftune.MaskNorm()
    honest = masks(graftune.GradientDropout(1.0), norm)
    sgd = {"optim": "sgd"}
    alone = [
        Variant(PROMPTS, prompts(), (3e-3, 1e-2, 3e-2)),
        Variant(LORA, lambda base, _: graftune.wrap(base, LoraConfig(r=4)), (3e-4, 1e-3, 3e-3)),
    ]
    on_top = [
        Variant(f"{v.name}, then masks", honest, SGD_RATES, after=v, arguments=sgd) for v in alone
    ]
    return [
        Variant(MASKS, masks(norm), SGD_RATES, measure=more, arguments=sgd),
        Variant(DROPOUT, honest, SGD_RATES, measure=more, arguments=sgd),
        Variant(SAME_RATE, honest, of=MASKS, measure=more, arguments=sgd),
        Variant(ADAM, honest, ADAM_RATES, measure=more),
        *alone,
        *on_top,
    ]


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The claims, judged by the means over the seeds."""

    def better(text: str, one: str, other: str, measured: str) -> Claim:
        return superior(text, (measured, paired(rows, one, other, measured)))

    masked = statistics.mean(test_scores(rows, DROPOUT, "masked"))
    gains = paired(rows, DROPOUT, "zero-shot", "base")
    elsewhere = test_scores(rows, DROPOUT, OTHER_STYLE)
    less = [own - other for own, other in zip(gains, elsewhere, strict=True)]
    return [
        better("masks gain on base classes against zero-shot", DROPOUT, "zero-shot", "base"),
        Claim("few weights are masked (≤ 5 %)", masked <= 5, f"{masked:.2f} % are"),
        better("gradient dropout helps on novel classes", DROPOUT, MASKS, "novel"),
        better("it helps on novel classes at the same rate", SAME_RATE, MASKS, "novel"),
        better("it keeps more of the old styles at the same rate", SAME_RATE, MASKS, "kept"),
        better("masks help deep prompts", f"{PROMPTS}, then masks", PROMPTS, "base"),
        better("masks help LoRA", f"{LORA}, then masks", LORA, "base"),
        superior(
            "masks gain less in a style they were not tuned for",
            (f"there {statistics.mean(elsewhere):+.1f}, less by", less),
        ),
    ]


if __name__ == "__main__":
    report(__doc__, RESULTS / "claims_mask_tuning.json", variants, claims)
