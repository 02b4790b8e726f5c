"""The claims of SaRA on the embedded UNet: what its smallest weights are good for.

    python benchmarks/claims_sara.py

Claims, of the paper (arXiv 2409.06633) in the words of this benchmark:

1. setting the smallest 10 or 20 % of the weights to zero barely changes what is drawn (agreement of
   95 % or more with the pictures before), while random or the largest ones do;
2. SaRA keeps more of the old style than LoRA at the same fit to the new one, with as many trained
   parameters;
3. of progressive release and the rank's regularizer, each helps, and both together are best (VLHI);
4. the smallest weights are better to train than random or the largest ones (VLHI).

The task is `examples/embedded/styles.py`: 24 pictures of a new style, drawn by a few words, and
other emoji in the old one without them. Learning rates are chosen on the validation split of
another seed: of those whose FID to the new style is within 10 % of what all methods reach, the one
that keeps the most of the old. As fits still differ from seed to seed, SaRA and LoRA are trained at
all their rates on the reported seeds, too, and what they keep is compared along these curves. A
claim that the numbers do not bear out is printed as such.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import RESULTS, Claim, difference, paired, superior, test_scores
from diffusion_style import Options, Training, Work, attach, embedded_work, fine_tune, measured
from rich.console import Console
from torch import nn
from transformers import set_seed

import graftune
from embedded.results import Results, table
from embedded.styles import style_task
from graftune.integrations.generation import image_distances, visual_linguistic_harmony

SARA, LORA, FLORA, FULL, BASE = "SaRA", "LoRA", "FLoRA", "full fine-tuning", "base model"
NEITHER, RELEASE, RANK = "SaRA without both", "SaRA, release only", "SaRA, rank only"
LARGEST, RANDOM = "SaRA of the largest", "SaRA of random ones"
MEASURES = {"FID": ".1f", "KID": ".1f", "CLIP": ".1f", "old kept": ".1f", "old KID": ".1f"}
BARELY = 95.0  # % of agreement
CURVE = "test, other rates"
SHARES = (0.1, 0.2)


@dataclass(frozen=True)
class Variant:
    """A way of fine-tuning the embedded UNet.

    Args:
        name: what it is called in tables.
        attach: adds what is trained, given the UNet and the number of parameters.
        rates: learning rates to choose from; none takes SaRA's.
    """

    name: str
    attach: Callable[[nn.Module, int], nn.Module]
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What all variants share."""

    parameters: int = 587_000  # a tenth
    steps: int = 200
    batch: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    search_seed: int = 100


def sara(**fields: Any) -> Callable[[nn.Module, int], nn.Module]:
    """Attach SaRA, with other fields or regularizers than its recipe's."""

    def attach_sara(unet: nn.Module, parameters: int) -> nn.Module:
        return graftune.wrap(unet, "sara", num_parameters=parameters, **fields)

    return attach_sara


def other(method: str) -> Callable[[nn.Module, int], nn.Module]:
    """Attach what the example does."""
    return lambda unet, parameters: attach(unet, method, parameters)


VARIANTS = (
    Variant(SARA, sara(), (2.5e-3, 5e-3, 1e-2)),
    Variant(LORA, other("lora"), (2.5e-3, 5e-3, 8e-3)),
    Variant(FLORA, other("flora"), (2.5e-3, 5e-3, 8e-3)),
    Variant(FULL, other("full"), (3e-4, 1e-3)),
    Variant(NEITHER, sara(regularizers=[])),
    Variant(RELEASE, sara(regularizers=[graftune.ProgressiveRelease()])),
    Variant(RANK, sara(regularizers=[graftune.NuclearNorm()])),
    Variant(LARGEST, sara(select="largest")),
    Variant(RANDOM, sara(select="random")),
)


def zeroed(share: float, which: str) -> str:
    """Return what a model without a share of its weights is called."""
    return f"{which} {share:.0%} zeroed"


@torch.no_grad()
def zero(unet: nn.Module, share: float, which: str, seed: int) -> None:
    """Set a share of all weights to zero: the smallest, the largest or random ones."""
    weights = [p for p in unet.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    ranks = [
        torch.rand(w.shape, generator=generator) if which == "random" else w.abs() for w in weights
    ]
    every = torch.cat([rank.flatten() for rank in ranks])
    if which == "largest":
        ranks, every = [-rank for rank in ranks], -every
    limit = every.kthvalue(round(share * len(every))).values
    for weight, rank in zip(weights, ranks, strict=True):
        weight[rank <= limit] = 0


class Drawing:
    """A seed's work, and what the base model draws for it."""

    def __init__(self, seed: int, split: str) -> None:
        self.seed = seed
        self.work: Work = embedded_work(Options(split=split), seed)
        self.base: nn.Module = self.work.pipeline.unet
        self.before = self.work.drawn()
        self.old = getattr(style_task(seed), split).old_images

    def scores(self, unet: nn.Module) -> dict[str, float]:
        """Return how well a model draws the new style and the old."""
        self.work.pipeline.register_modules(unet=unet)
        drawn = self.before if unet is self.base else self.work.drawn()
        found = measured(self.work, drawn, self.before)
        found["old KID"] = image_distances(drawn[1], self.old, self.work.features)["kid"]
        return {name: found[name] for name in MEASURES}

    def train(self, variant: Variant, rate: float, settings: Settings) -> dict[str, float]:
        """Train a variant, and return its scores."""
        set_seed(self.seed)
        unet = copy.deepcopy(self.base)
        model = variant.attach(unet, settings.parameters)
        with tempfile.TemporaryDirectory() as folder:
            args = Training(
                folder,
                learning_rate=rate,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch,
                seed=self.seed,
                use_cpu=True,
            )
            fine_tune(self.work, model, args, prior_weight=1.0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"trained": trained, **self.scores(unet)}

    def without(self, share: float, which: str) -> dict[str, float]:
        """Return the scores of the base model with a share of its weights zeroed."""
        unet = copy.deepcopy(self.base)
        zero(unet, share, which, self.seed)
        return self.scores(unet)


def fill_in(results: Results, settings: Settings) -> None:
    """Fill in the rows that are missing: the search, then the test split at the chosen rates."""
    runs = [
        (variant, rate, settings.search_seed, "validation")
        for variant in VARIANTS
        for rate in variant.rates
    ]
    run_all(runs, results, settings)
    rates = chosen_rates(results.rows)
    for seed in settings.seeds:
        runs = [(v, rates[v.name if v.rates else SARA], seed, "test") for v in VARIANTS]
        runs += [
            (variant, rate, seed, CURVE)
            for variant in VARIANTS[:2]
            for rate in variant.rates
            if rate != rates[variant.name]
        ]
        drawing = run_all(runs, results, settings)
        missing = [
            (share, which)
            for which in ("smallest", "random", "largest")
            for share in SHARES
            if not results.has(variant=zeroed(share, which), seed=seed)
        ]
        if missing and drawing is None:
            drawing = Drawing(seed, "test")
        for share, which in missing:
            row = {"variant": zeroed(share, which), "rate": 0.0, "seed": seed, "split": "test"}
            results.add({**row, "trained": 0, **drawing.without(share, which)})


def run_all(
    runs: Sequence[tuple[Variant, float, int, str]], results: Results, settings: Settings
) -> Drawing | None:
    """Make the missing rows of one seed, that of the base model among them."""
    drawing: Drawing | None = None
    for variant, rate, seed, split in runs:
        key = {"variant": variant.name, "rate": rate, "seed": seed, "split": split}
        if results.has(**key):
            continue
        drawing = drawing or Drawing(seed, "test" if split == CURVE else split)
        base = {"variant": BASE, "rate": 0.0, "seed": seed, "split": split}
        if split != CURVE and not results.has(**base):
            results.add({**base, "trained": 0, **drawing.scores(drawing.base)})
        results.add({**key, **drawing.train(variant, rate, settings)})
        found = results.rows[-1]
        shown = ", ".join(f"{name} {found[name]:{form}}" for name, form in MEASURES.items())
        print(f"{variant.name}, rate {rate:g}, seed {seed}, {split}: {shown}", flush=True)
    return drawing


def chosen_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the rates at which all variants fit the new style alike and keep the most of the old.

    The fit that all are to have is that of the variant which fits worst at its best.
    """
    searched = [row for row in rows if row["split"] == "validation" and row["variant"] != BASE]
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in searched:
        by_name.setdefault(row["variant"], []).append(row)
    common = max(min(row["FID"] for row in some) for some in by_name.values())
    chosen = {}
    for name, some in by_name.items():
        fit = [row for row in some if row["FID"] <= 1.1 * common]
        chosen[name] = max(fit, key=lambda row: row["old kept"])["rate"]
    return chosen


def harmony(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Return the index of some variants among themselves, seed by seed."""
    found: dict[str, list[float]] = {name: [] for name in names}
    fids, clips = ({n: test_scores(rows, n, m) for n in names} for m in ("FID", "CLIP"))
    for seed in range(len(fids[names[0]])):
        of_seed = visual_linguistic_harmony(
            {name: values[seed] for name, values in fids.items()},
            {name: values[seed] for name, values in clips.items()},
        )
        for name, value in of_seed.items():
            found[name].append(value)
    return found


def more_at_the_same_fit(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> list[float]:
    """Return, seed by seed, how much more one variant keeps than another at the same FID.

    Through what a variant reaches at its rates goes a curve of straight lines; the difference is
    the mean over all fits that both curves reach.
    """

    def points(name: str, seed: int) -> np.ndarray:
        of_seed = [row for row in rows if row["variant"] == name and row["seed"] == seed]
        found = [(r["FID"], r["old kept"]) for r in of_seed if r["split"] in ("test", CURVE)]
        return np.array(sorted(found)).T

    found = []
    for seed in sorted({row["seed"] for row in rows if row["split"] == "test"}):
        ours, theirs = points(one, seed), points(other, seed)
        fits = np.linspace(max(ours[0][0], theirs[0][0]), min(ours[0][-1], theirs[0][-1]), 101)
        found.append(float(np.mean(np.interp(fits, *ours) - np.interp(fits, *theirs))))
    return found


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The claims, judged by the means over the seeds."""

    def kept(name: str) -> float:
        return statistics.mean(test_scores(rows, name, "old kept"))

    def barely(share: float) -> Claim:
        found = {which: kept(zeroed(share, which)) for which in ("smallest", "random", "largest")}
        numbers = ", ".join(f"{which} {value:.1f} %" for which, value in found.items())
        holds = found["smallest"] >= BARELY and max(found["random"], found["largest"]) < BARELY
        text = f"without the smallest {share:.0%} the pictures stay, without others they do not"
        return Claim(text, holds, f"agreement: {numbers}")

    def better(text: str, index: Mapping[str, list[float]], one: str, other: str) -> Claim:
        values = [a - b for a, b in zip(index[one], index[other], strict=True)]
        return superior(text, ("VLHI", values), form=".2f")

    same_fit = superior(
        "SaRA keeps more of the old style than LoRA at the same fit",
        ("agreement", more_at_the_same_fit(rows, SARA, LORA)),
    )
    more, fit = (paired(rows, SARA, LORA, name) for name in ("old kept", "FID"))
    at_the_rates = f"at the chosen rates {difference(more)}, with a FID of {difference(fit)}"
    parts = harmony(rows, (SARA, RELEASE, RANK, NEITHER))
    chosen = harmony(rows, (SARA, LARGEST, RANDOM))
    return [
        *(barely(share) for share in SHARES),
        Claim(same_fit.text, same_fit.holds, f"{same_fit.numbers}; {at_the_rates}"),
        better("release alone helps", parts, RELEASE, NEITHER),
        better("the rank's regularizer alone helps", parts, RANK, NEITHER),
        better("both together are better than release alone", parts, SARA, RELEASE),
        better("the smallest weights are better than the largest", chosen, SARA, LARGEST),
        better("the smallest weights are better than random ones", chosen, SARA, RANDOM),
    ]


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw fit against what is kept, and what zeroed weights do."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (fit, ablation, zeros) = pyplot.subplots(1, 3, figsize=(17, 4.5))
    for place, variant in enumerate(VARIANTS[:4]):
        own = [row for row in rows if row["variant"] == variant.name]
        for seed in sorted({row["seed"] for row in own}):
            of_seed = sorted((r["FID"], r["old kept"]) for r in own if r["seed"] == seed)
            dashes = (
                "--" if {r["split"] for r in own if r["seed"] == seed} == {"validation"} else "-"
            )
            fit.plot(*zip(*of_seed, strict=True), "." + dashes, color=f"C{place}", alpha=0.5)
        points = [test_scores(rows, variant.name, name) for name in ("FID", "old kept")]
        fit.plot(*points, "o", color=f"C{place}", label=variant.name)
    fit.set(xlabel="FID to the new style", ylabel="old style kept, %")
    fit.set_title("lines: a seed's rates (dashed: validation); points: chosen")
    fit.legend()
    names = [SARA, *(variant.name for variant in VARIANTS[4:])]
    for name in names:
        points = [test_scores(rows, name, measured) for measured in ("FID", "CLIP")]
        ablation.plot(*points, "o", label=name)
    ablation.legend()
    ablation.set(xlabel="FID to the new style", ylabel="CLIP score", title="SaRA's parts")
    labels = [zeroed(share, w) for share in SHARES for w in ("smallest", "random", "largest")]
    kept = [statistics.mean(test_scores(rows, name, "old kept")) for name in labels]
    zeros.barh(labels, kept)
    zeros.axvline(BARELY, color="grey", linestyle=":")
    zeros.set(xlabel="agreement with the base model's pictures, %")
    zeros.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure what is missing, judge, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "claims_sara.json")
    parser.add_argument("--seeds", type=int, default=len(Settings.seeds))
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, seeds=tuple(range(args.seeds)))
    results = Results(args.results, dataclasses.asdict(settings))
    fill_in(results, settings)
    console = Console(width=120)
    shown = [row for row in results.rows if row["split"] == "test"]
    columns = {"trained": ",.0f", **MEASURES}
    console.print(table("Test split", shown, ("variant",), columns))
    judged = claims(results.rows)
    for claim in judged:
        verdict = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        console.print(f"{verdict}: {claim.text} ({claim.numbers})")
    plot(results.rows, args.results.with_suffix(".png"))
    content = json.loads(args.results.read_text(encoding="utf-8"))
    content["claims"] = [dataclasses.asdict(claim) for claim in judged]
    args.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
