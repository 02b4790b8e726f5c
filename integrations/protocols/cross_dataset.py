"""Cross-dataset: train on one data set, ask about others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def cross_dataset(
    study: Study,
    data: Dataset,
    others: Mapping[str, Dataset],
    *,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    source: object = "",
) -> ProtocolResult:
    """Train on a few pictures of every class of one data set; measure on others, whole.

    Args:
        study: the adapter and how it is trained.
        data: what is trained on, from `load_images`; what is left of it is measured as "source".
        others: data sets by name, each asked about among its own classes.
        shots: training pictures of each class.
        seeds: one run each.
        source: what the training data are called in the record.

    Returns:
        Rows with "source" and each other data set's accuracy in percent, and "average" over the
        others.

    Raises:
        ValueError: a class has fewer pictures than `shots`, or there are no other data sets.
    """
    if not others or "source" in others or "average" in others:
        raise ValueError(
            f"others has {sorted(others)}; give at least one other data set by name, none called "
            "'source' or 'average'"
        )
    data = numbered(data)
    result = ProtocolResult("cross-dataset", ("source", *others, "average"))
    for seed in seeds:
        train, rest, selection = draw_shots(data, shots, seed, source)
        trainer = study.fit(train, seed)
        row = {name: study.accuracy(trainer, other) for name, other in others.items()}
        average = sum(row.values()) / len(row)
        own = study.accuracy(trainer, rest) if len(rest) else float("nan")
        result.rows.append({"seed": seed, "source": own, **row, "average": average})
        result.selections.append(selection)
        measured = {name: recorded(numbered(other), name) for name, other in others.items()}
        result.measured.append({"source": recorded(rest, source), **measured})
    return result
