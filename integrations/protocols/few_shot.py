"""Few shots: how accuracy grows with the number of training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftune.integrations.protocols.study import (
    ProtocolResult,
    Study,
    draw_shots,
    numbered,
    recorded,
)

if TYPE_CHECKING:
    from datasets import Dataset


def few_shot_curve(
    study: Study,
    data: Dataset,
    *,
    test: Dataset | None = None,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    source: object = "",
    test_source: object = "",
) -> ProtocolResult:
    """Train on K pictures of every class, for several K, and measure on the others.

    Args:
        study: the adapter and how it is trained.
        data: what `load_images` returned.
        test: pictures to measure on, the same for every K; None takes, for every seed, those that
            the largest K leaves.
        shots: the numbers K.
        seeds: one run each.
        source: what the data are called in the record.
        test_source: the same for `test`.

    Returns:
        Rows with "shots", and "accuracy" in percent.

    Raises:
        ValueError: a class has fewer pictures than the largest K.
    """
    data = numbered(data)
    result = ProtocolResult("few-shot", ("accuracy",))
    for seed in seeds:
        most, rest, _ = draw_shots(data, max(shots), seed, source)
        asked, where = (rest, source) if test is None else (numbered(test), test_source)
        for count in shots:
            # Of the pictures that the largest K trains on, so that none is ever measured on.
            train, _, selection = draw_shots(most, count, seed, source)
            trainer = study.fit(train, seed)
            accuracy = study.accuracy(trainer, asked)
            result.rows.append({"seed": seed, "shots": count, "accuracy": accuracy})
            result.selections.append(selection)
            result.measured.append({"accuracy": recorded(asked, where)})
    return result
