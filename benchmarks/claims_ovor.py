"""The claims of OVOR on the embedded class-incremental tasks: one prompt, and virtual outliers.

    taskset -c 0 python benchmarks/claims_ovor.py --threads 1

Claims, of OVOR (arXiv 2402.04129) and of A Closer Look at Rehearsal-Free Continual Learning (arXiv
2203.17269) in the words of this benchmark, about the final average accuracy over ten tasks:

1. OnePrompt is within a point of the best pool, with fewer numbers and half the work for an image;
2. virtual outliers raise OnePrompt and each pool, against the adapter without the phase that they
   act in and against the same phase without them;
3. outliers around the boundary are better than those around the origin;
4. attention fine-tuned with an L2 penalty to the previous task's weights is better than prompts,
   than without it, than with EWC and than with distillation from the previous model.

Learning rates, weights and noise are chosen on the validation split of another seed, first the rate
without outliers and then the outliers' settings; the file of results has the whole search. A claim
that the numbers do not bear out is printed as not holding.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import RESULTS, Claim, chosen, conclude, difference, paired, superior, test_scores
from incremental import HEAD, Learner, Run, Settings, learn, with_outliers
from matplotlib.figure import Figure
from peft import LoraConfig
from torch import nn
from transformers.utils import logging

import graftune
from embedded.results import Results
from graftune.integrations.class_incremental import metrics
from graftune.integrations.class_incremental.plots import draw_curves

ONE, POOLS = "OnePrompt", ("L2P", "DualPrompt", "CODA-Prompt")
PROMPTS = (ONE, *POOLS)
ALONE, ATTENTION = "classifier alone", "attention"
L2, EWC, DISTILLED = "attention + L2", "attention + EWC", "attention + distillation"
LONGER, BOUNDARY, ORIGIN = ", classifier longer", " + outliers", " + outliers at origin"
FINAL, CURVE, FORGETTING = "final", "curve", "forgetting"
MEASURES = (FINAL, CURVE, FORGETTING)
ABOUT_HALF = 0.55  # the query costs a pass without prompts, so half is not quite reached
LENGTHS = [4, 4, 8, 8, 8]  # of 17 tokens; the paper's 10 and 40 are of 197
QKV = ["q_proj", "k_proj", "v_proj"]


def prompted(recipe: str, **fields: Any) -> Any:
    """Attach a recipe's adapter, with its regularizers other than outliers."""
    found = graftune.recipes()[recipe].regularizers
    kept = [each for each in found if not isinstance(each, graftune.VirtualOutliers)]

    def wrap(base: nn.Module, _: float) -> nn.Module:
        return graftune.wrap(base, recipe, modules_to_save=[HEAD], regularizers=kept, **fields)

    return wrap


def in_full(*modules: str, regularizer: type[Any] | None = None) -> Any:
    """Train modules and the classifier in full, beside a LoRA that stays at its start: nothing."""

    def wrap(base: nn.Module, weight: float) -> nn.Module:
        config = LoraConfig(r=1, target_modules=["fc1"], modules_to_save=[*modules, HEAD])
        regularizers = [] if regularizer is None else [regularizer(weight)]
        model = graftune.wrap(base, config, regularizers=regularizers)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
        return model

    return wrap


def learners(settings: Settings) -> list[Learner]:
    """All that is compared."""
    pool = {"tasks": settings.tasks}
    blocks = range(len(LENGTHS))
    return [
        Learner(ALONE, in_full(), outliers=True),
        Learner(ONE, prompted("ovor", lengths=LENGTHS), outliers=True),
        Learner("L2P", prompted("l2p", pool_size=10, length=2, chosen=4), outliers=True),
        Learner(
            "DualPrompt",
            prompted("dual_prompt", general_length=LENGTHS[0], expert_length=LENGTHS[-1], **pool),
            outliers=True,
        ),
        Learner(
            "CODA-Prompt",
            prompted(
                "coda_prompt", pool_size=5 * settings.tasks, prompt_blocks=list(blocks), **pool
            ),
            outliers=True,
        ),
        Learner(ATTENTION, in_full(*QKV), (3e-4, 1e-3, 3e-3)),
        *(
            Learner(name, in_full(*QKV, regularizer=regularizer), weights=weights, of=ATTENTION)
            for name, regularizer, weights in (
                (L2, graftune.L2ToStart, (0.01, 0.1, 1.0)),
                (EWC, graftune.ElasticWeightConsolidation, (1e2, 1e4)),
                (DISTILLED, graftune.PreviousDistillation, (0.3, 3.0)),
            )
        ),
    ]


@dataclasses.dataclass
class Measurement:
    """Fills in the rows that are missing.

    Args:
        results: the rows so far.
        settings: what all learners share.
    """

    results: Results
    settings: Settings

    def __post_init__(self) -> None:
        self._runs: dict[tuple[Any, ...], Run] = {}

    def fill_in(self, learner: Learner) -> None:
        """Search on the validation split, then measure the test split at what was chosen."""
        search, rows = self.settings.search_seed, self.results.rows
        rates = learner.rates
        if learner.of is not None:
            rates = (chosen(rows, learner.of, ("rate",), FINAL)[0],)
        for rate, weight in itertools.product(rates, learner.weights):
            self.plain(learner, rate, weight, search, "validation")
        rate, weight = chosen(rows, learner.name, ("rate", "weight"), FINAL)
        for seed in self.settings.seeds:
            self.plain(learner, rate, weight, seed, "test")
        if not learner.outliers:
            return
        for suffix in (LONGER, BOUNDARY, ORIGIN):
            for of_term, sigma in self._grid(suffix):
                self.phase(learner, rate, search, "validation", suffix, of_term, sigma)
            name = learner.name + suffix
            of_term, sigma = chosen(rows, name, ("outlier weight", "sigma"), FINAL)
            for seed in self.settings.seeds:
                self.phase(learner, rate, seed, "test", suffix, of_term, sigma)
        self._runs.clear()

    def _grid(self, suffix: str) -> Iterator[tuple[float, float]]:
        weights = (0.0,) if suffix == LONGER else self.settings.outlier_weights
        sigmas = self.settings.sigmas[:1] if suffix == LONGER else self.settings.sigmas
        return itertools.product(weights, sigmas)

    def plain(self, learner: Learner, rate: float, weight: float, seed: int, split: str) -> None:
        """Add the row of a learner without outliers."""
        key = {"variant": learner.name, "split": split, "seed": seed}
        key |= {"rate": rate, "weight": weight}
        if not self.results.has(**key):
            run = self.run(learner, rate, weight, seed, split)
            self._add(key, run, [list(row) for row in run.record.accuracies])

    def phase(
        self,
        learner: Learner,
        rate: float,
        seed: int,
        split: str,
        suffix: str,
        of_term: float,
        sigma: float,
    ) -> None:
        """Add the row of a learner with an outlier phase."""
        key = {"variant": learner.name + suffix, "split": split, "seed": seed, "rate": rate}
        key |= {"outlier weight": of_term, "sigma": sigma}
        if self.results.has(**key):
            return
        run = self.run(learner, rate, learner.weights[0], seed, split)
        outliers = graftune.VirtualOutliers(
            of_term,
            neighbours=self.settings.neighbours,
            select=self.settings.select,
            sigma=sigma,
            outlier_center="origin" if suffix == ORIGIN else "boundary",
        )
        self._add(key, run, with_outliers(run, outliers, rate, seed, self.settings))

    def run(self, learner: Learner, rate: float, weight: float, seed: int, split: str) -> Run:
        """Return a learner's run, which phases share."""
        key = (learner.name, rate, weight, seed, split)
        if key not in self._runs:
            self._runs[key] = learn(learner, rate, weight, seed, split, self.settings)
        return self._runs[key]

    def _add(self, key: dict[str, Any], run: Run, accuracies: list[list[float]]) -> None:
        found = metrics(accuracies)
        row = {
            **key,
            FINAL: found["final_average_accuracy"],
            CURVE: found["curve_average"],
            FORGETTING: found["forgetting"],
            "trained": run.trained,
            "forwards": run.forwards,
            "operations": run.operations,
            "accuracies": accuracies,
        }
        self.results.add(row)
        shown = ", ".join(f"{name} {row[name]:.1f}" for name in MEASURES)
        print(", ".join(f"{name} {value}" for name, value in key.items()), ":", shown, flush=True)


def mean(rows: Sequence[dict[str, Any]], name: str, measure: str = FINAL) -> float:
    """Return a variant's mean over the seeds."""
    return statistics.mean(test_scores(rows, name, measure))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The claims, judged by the means over the seeds."""

    def better(text: str, one: str, *others: str) -> Claim:
        return superior(text, *((f"over {o}:", paired(rows, one, o, FINAL)) for o in others))

    best = max(POOLS, key=lambda name: mean(rows, name))
    gaps = paired(rows, ONE, best, FINAL)
    numbers = {name: mean(rows, name, "trained") for name in (ONE, best)}
    share = mean(rows, ONE, "operations") / mean(rows, best, "operations")
    passes = [mean(rows, name, "forwards") for name in (ONE, best)]
    return [
        Claim(
            "OnePrompt is within a point of the best pool, or better",
            statistics.mean(gaps) >= -1,
            f"over {best}: {difference(gaps)}",
        ),
        Claim(
            "OnePrompt has fewer numbers than that pool",
            numbers[ONE] < numbers[best],
            f"{numbers[ONE]:,.0f} against {numbers[best]:,.0f}",
        ),
        Claim(
            "OnePrompt takes half that pool's work for an image",
            share <= ABOUT_HALF,
            f"{passes[0]:.0f} pass against {passes[1]:.0f}, {share:.2f} of its operations",
        ),
        *(
            better(f"virtual outliers raise {name}", name + BOUNDARY, name, name + LONGER)
            for name in PROMPTS
        ),
        *(
            better(
                f"outliers at the boundary are better than at the origin for {name}",
                name + BOUNDARY,
                name + ORIGIN,
            )
            for name in PROMPTS
        ),
        better("attention with L2 is better than prompts", L2, *PROMPTS),
        better("attention with L2 is better than without", L2, ATTENTION),
        better("attention with L2 is better than with EWC", L2, EWC),
        better("attention with L2 is better than with distillation", L2, DISTILLED),
    ]


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> None:
    """Draw the curves over the tasks, and beside them what each outlier phase changes."""
    means = {name: np.mean([matrix(row) for row in rows if _is(row, name)], 0) for name in names}
    draw_curves(means, file.with_name(f"{file.stem}_curves{file.suffix}"))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    places = np.arange(len(PROMPTS) + 1)
    for shift, suffix in zip((-0.25, 0.0, 0.25), (LONGER, BOUNDARY, ORIGIN), strict=True):
        changes = [paired(rows, name + suffix, name, FINAL) for name in (ALONE, *PROMPTS)]
        errors = [statistics.stdev(each) / len(each) ** 0.5 for each in changes]
        heights = [statistics.mean(each) for each in changes]
        axis.bar(places + shift, heights, 0.22, yerr=errors, label=suffix.strip(" ,+"))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="final average accuracy, points over no further phase")
    axis.set_xticks(places, (ALONE, *PROMPTS))
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def matrix(row: Mapping[str, Any]) -> np.ndarray:
    """Return a row's accuracies as a square, zeros above the diagonal."""
    found = row["accuracies"]
    return np.array([[*line, *[0.0] * (len(found) - len(line))] for line in found])


def _is(row: Mapping[str, Any], name: str) -> bool:
    return row["variant"] == name and row["split"] == "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "claims_ovor.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=Settings.tasks)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one of each setting, for a look")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = Settings(tasks=args.tasks, epochs=args.epochs, seeds=tuple(range(args.seeds)))
    compared = learners(settings)
    if args.quick:
        settings = dataclasses.replace(settings, outlier_weights=(0.1,), sigmas=(0.1,))
        compared = [
            dataclasses.replace(learner, rates=learner.rates[:1], weights=learner.weights[:1])
            for learner in compared
        ]
    grid = {each.name: {"rate": each.rates, "weight": each.weights} for each in compared}
    results = Results(args.results, {**dataclasses.asdict(settings), "search": grid})
    measurement = Measurement(results, settings)
    for learner in compared:
        measurement.fill_in(learner)
    suffixes = ("", LONGER, BOUNDARY, ORIGIN)
    names = [e.name + s for e in compared for s in (suffixes if e.outliers else ("",))]
    conclude(args.results, results.rows, names, claims(results.rows), MEASURES)
    plot(results.rows, [each.name for each in compared], args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
