"""Base to novel: train on half of the classes, ask about both halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftune.integrations.data.sampling import select_classes, split_classes
from graftune.integrations.protocols.study import (
    ProtocolResult,
    Study,
    draw_shots,
    numbered,
    recorded,
)

if TYPE_CHECKING:
    from datasets import Dataset


def harmonic_mean(base: float, novel: float) -> float:
    """Return 2bn / (b + n); 0 where either is 0.

    Example:
        >>> harmonic_mean(80.0, 60.0)
        68.57142857142857
    """
    return 2 * base * novel / (base + novel) if base and novel else 0.0


def base_to_novel(
    study: Study,
    data: Dataset,
    *,
    test: Dataset | None = None,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    source: object = "",
    test_source: object = "",
) -> ProtocolResult:
    """Train on a few pictures of the first half of the classes; measure on both halves.

    Base classes are asked about among base classes and novel ones among novel ones, as in CoCoOp
    (arXiv 2203.05557, section 4.1); H is the harmonic mean of the two accuracies.

    Args:
        study: the adapter and how it is trained.
        data: what `load_images` returned.
        test: pictures to measure on, of the same classes; None takes all that were not trained on.
        shots: training pictures of each base class.
        seeds: one run each; a seed decides which pictures are trained on and how.
        source: what the data are called in the record.
        test_source: the same for `test`.

    Returns:
        Rows with "base", "novel" and "H" in percent.

    Raises:
        ValueError: a base class has fewer pictures than `shots`, or there is only one class.
    """
    data, test = numbered(data), None if test is None else numbered(test)
    base, novel = split_classes(data.features["label"].names)
    result = ProtocolResult("base-to-novel", ("base", "novel", "H"))
    for seed in seeds:
        train, rest, selection = draw_shots(select_classes(data, base), shots, seed, source)
        trainer = study.fit(train, seed)
        parts = {
            "base": rest if test is None else select_classes(test, base),
            "novel": select_classes(data if test is None else test, novel),
        }
        row = {name: study.accuracy(trainer, part) for name, part in parts.items()}
        result.rows.append({"seed": seed, **row, "H": harmonic_mean(*row.values())})
        result.selections.append(selection)
        where = source if test is None else test_source
        result.measured.append({name: recorded(part, where) for name, part in parts.items()})
    return result
