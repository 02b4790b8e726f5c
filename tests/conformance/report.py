"""The table at the end: what ran, what did not and why, and whether that is enough."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

from .rows import FAMILIES

COLUMNS = ("collected", "passed", "failed", "skipped by PEFT", "deselected")


def conclude(results: Path, collected: Path, *, quick: bool, whole: bool, code: int) -> int:
    """Print the table and return the exit status.

    Args:
        results: pytest's JUnit file.
        collected: what the plugin noted while pytest collected.
        quick: whether this was the quick form.
        whole: whether all families ran, so that there are minimums to keep.
        code: pytest's exit status.
    """
    if not (results.is_file() and collected.is_file()):
        print("pytest ended before it ran anything")
        return code or 1
    notes = json.loads(collected.read_text())
    counts, reasons = _outcomes(results)
    problems = []
    print(f"\n{'PEFT test file':34}" + "".join(f"{name:>17}" for name in COLUMNS))
    total: Counter[str] = Counter()
    for family, settings in FAMILIES.items():
        row = counts[family]
        row["collected"] = notes["collected"].get(family, 0)
        row["deselected"] = len(notes["deselected"].get(family, ()))
        if not row["collected"] and not (whole and not quick):
            continue
        total += row
        print(f"{family:34}" + "".join(f"{row[name]:17}" for name in COLUMNS))
        minimum = settings.quick_minimum if quick else settings.minimum
        if whole and row["passed"] < minimum:
            problems.append(f"{family}: {row['passed']} passed, at least {minimum} must")
    print(f"{'all':34}" + "".join(f"{total[name]:17}" for name in COLUMNS))
    _listing("Deselected", _by_reason(notes["deselected"], with_names=not quick))
    _listing("Skipped by PEFT", reasons.most_common())
    if not quick:
        _listing("Rows of built-in methods without a counterpart", _lost(notes["lost"]))
    if whole:
        problems += [f"rows.py names tests that there are not: {name}" for name in notes["stale"]]
    if total["failed"]:
        problems.append(f"{total['failed']} failed")
    for problem in problems:
        print(f"NOT CONFORMING: {problem}")
    return 1 if problems else code


def _outcomes(results: Path) -> tuple[dict[str, Counter[str]], Counter[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        family = f"{case.get('classname')}.{case.get('name')}".split(".")[1]
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        elif skipped is not None:
            outcome = "skipped by PEFT"
            reasons[skipped.get("message", "")] += 1
        else:
            outcome = "passed"
        counts[family][outcome] += 1
    return counts, reasons


def _by_reason(deselected: dict[str, list[str]], with_names: bool) -> list[tuple[str, int]]:
    tests: Counter[str] = Counter()
    for family, entries in deselected.items():
        for entry in entries:
            name, reason = entry.rsplit(": ", 1)
            test = f"\n         {family}::{name.partition('[')[0]}"
            tests[reason + (test if with_names else "")] += 1
    return sorted(tests.items())


def _lost(entries: list[str]) -> list[tuple[str, int]]:
    return Counter(entry.rpartition(": ")[2] for entry in entries).most_common()


def _listing(title: str, entries: list[tuple[str, int]]) -> None:
    if entries:
        print(f"\n{title}:")
    for text, count in entries:
        print(f"  {count:4} x {text}")
