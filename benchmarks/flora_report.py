"""What the FLoRA benchmark prints: tables of ratios, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

TITLES = {
    "frozen": "frozen",
    "lora": "LoRA",
    "dense": "dense ΔW",
    "lycoris": "LyCORIS",
    "lycoris_default": "LyCORIS default",
}


@dataclass(frozen=True)
class Target:
    """What a ratio of one kind of layer has to reach."""

    name: str
    kind: str
    limit: float
    at_least: bool = False


# Merged inference runs the very operation of the base layer. Its target is 1.00; what is allowed
# beyond it is the noise of timing one layer twice, which the result states beside it.
TARGETS = (
    Target("flora / frozen", "conv", 1.15),
    Target("dense / flora", "conv", 2.5, at_least=True),
    Target("flora / lora", "linear", 1.05),
    Target("merged / base", "conv", 1.02),
    Target("merged / base", "linear", 1.02),
)


def judge(case: Mapping[str, Any], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Return for every target of a measured case its value and by how much it is missed."""
    ratios = {**case["training"]["time_ratios"], **case["inference"]["time_ratios"]}
    verdicts = []
    for target in targets:
        if target.kind != case["kind"]:
            continue
        value = ratios[target.name]
        missing = target.limit - value if target.at_least else value - target.limit
        verdicts.append(
            {
                "case": case["name"],
                "target": f"{target.name} {'≥' if target.at_least else '≤'} {target.limit}",
                "value": value,
                "met": missing <= 0,
                "missed_by": max(0.0, missing),
            }
        )
    return verdicts


def time_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Return the ratios of times, one row a case."""
    shown = _table(
        "Time of FLoRA's training step: ms, and over the time of", "ms", *TITLES.values()
    )
    shown.add_column("merged\n/ base", justify="right")
    shown.add_column("base\n/ base", justify="right")
    for case in cases:
        inference = case["inference"]["time_ratios"]
        shown.add_row(
            case["name"],
            f"{1000 * case['training']['seconds']['flora']['median']:.1f}",
            *_ratios(case["training"]["time_ratios"]),
            f"{inference['merged / base']:.2f}",
            f"{inference['base_again / base']:.2f}",
        )
    return shown


def memory_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Return the ratios of peak memory, operations and numbers trained, one row a case."""
    shown = _table(
        "Peak memory of FLoRA's training step: MiB, and over that of", "MiB", *TITLES.values()
    )
    shown.add_column("FLOPs\n/ fwd", justify="right")
    shown.add_column("trains\nFLoRA", justify="right")
    shown.add_column("\nLoRA", justify="right")
    for case in cases:
        training = case["training"]
        shown.add_row(
            case["name"],
            f"{training['peak_bytes']['flora'] / 2**20:.1f}",
            *_ratios(training["memory_ratios"]),
            f"{training['flops_over_frozen_forward']['flora']:.2f}",
            f"{training['parameters']['flora']:,}",
            f"{training['parameters']['lora']:,}",
        )
    return shown


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("layer", no_wrap=True)
    for column in columns:
        shown.add_column(column.replace(" ", "\n"), justify="right")
    return shown


def _ratios(ratios: Mapping[str, float]) -> list[str]:
    keys = [f"flora / {name}" for name in TITLES]
    return [f"{ratios[key]:.2f}" if key in ratios else "" for key in keys]


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """Return one line that says whether a target is met."""
    outcome = "met" if verdict["met"] else f"missed by {verdict['missed_by']:.3f}"
    return f"{verdict['case']:<16} {verdict['target']:<24} {verdict['value']:.3f}  {outcome}"
