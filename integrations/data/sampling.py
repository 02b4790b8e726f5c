"""Parts of a data set that a seed decides: few examples, some classes, a share held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.extras import require

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Selection:
    """What was chosen from where, to be written beside a result: `dataclasses.asdict` gives JSON.

    Args:
        source: the file, folder or data set.
        split: which part of it.
        seed: what decided the choice; None where nothing was random.
        shots: how many of each class; None where all.
        class_names: the classes, in the order of the labels; empty where there are none.
        rows: how many rows were chosen.
        digest: SHA-256 of the chosen rows' numbers, ascending, as little-endian 64-bit integers.
    """

    source: str
    split: str
    seed: int | None
    shots: int | None
    class_names: tuple[str, ...]
    rows: int
    digest: str

    @classmethod
    def of(
        cls,
        rows: Iterable[int],
        source: object,
        split: str = "train",
        seed: int | None = None,
        shots: int | None = None,
        class_names: Sequence[str] = (),
    ) -> Selection:
        """Record the rows chosen, by their numbers in the source.

        Example:
            >>> train = data.select(few_shot(data["label"], shots=8, seed=0)[0])
            >>> names = train.features["label"].names
            >>> Selection.of(train["row"], "flowers", seed=0, shots=8, class_names=names)
        """
        numbers = np.sort(np.fromiter(rows, dtype="<i8"))
        digest = hashlib.sha256(numbers.tobytes()).hexdigest()
        return cls(str(source), split, seed, shots, tuple(class_names), len(numbers), digest)


def few_shot(labels: Iterable[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Choose a few examples of each class at random, and return them and the rest as indices.

    Args:
        labels: the label of each example, (N,).
        shots: how many of each class to choose, at least 1.
        seed: decides which; the same seed chooses the same.

    Returns:
        The chosen indices, `shots` for each class, and all others, both in ascending order.

    Raises:
        ValueError: `shots` < 1, or a class has fewer examples than that.

    Example:
        >>> few_shot([0, 0, 1, 1], shots=1, seed=0)
        ([0, 2], [1, 3])
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}; it must be at least 1")
    array = np.asarray(list(labels), dtype=int)
    classes, counts = np.unique(array, return_counts=True)
    if len(counts) and counts.min() < shots:
        label, count = classes[counts.argmin()], counts.min()
        raise ValueError(
            f"class {label} has {count} examples, fewer than shots = {shots}; lower shots, add "
            "examples or leave the class out"
        )
    return _draw(array, dict.fromkeys(classes.tolist(), shots), seed)


def hold_out(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold a share of every class out, and return the rest and what is held out.

    Args:
        data: the data set; without a column "label", it counts as one class.
        share: between 0 and 1. Of a class of n rows, share · n are held out, rounded, but at least
            one and at most n − 1.
        seed: decides which; the same seed chooses the same.

    Raises:
        ValueError: `share` is not between 0 and 1, or a class has only one row.

    Example:
        >>> train, validation = hold_out(data, 0.1, seed=0)
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must be between 0 and 1, as in 0.1 for a tenth")
    labels = data.with_format(None)["label"] if "label" in data.column_names else [0] * len(data)
    array = np.asarray(list(labels), dtype=int)
    counts = Counter(array.tolist())
    alone = sorted(label for label, count in counts.items() if count < 2)
    if alone or not counts:
        whose = f"class {alone[0]} has one row" if alone else "the data have no rows"
        raise ValueError(f"{whose}, none of which can be held out; add rows or leave the class out")
    held = {label: min(max(round(share * n), 1), n - 1) for label, n in sorted(counts.items())}
    chosen, rest = _draw(array, held, seed)
    return data.select(rest), data.select(chosen)


def _draw(labels: np.ndarray, counts: dict[int, int], seed: int) -> tuple[list[int], list[int]]:
    """Choose so many of each label, and return the indices chosen and all others, ascending."""
    generator = np.random.default_rng(seed)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in counts.items()
    ]
    indices = np.sort(np.concatenate([np.empty(0, dtype=int), *chosen]))
    return indices.tolist(), np.setdiff1d(np.arange(len(labels)), indices).tolist()


def split_classes(names: Sequence[str], seed: int | None = None, parts: int = 2) -> list[list[str]]:
    """Split class names into parts of equal size, the first ones larger by one where need be.

    Args:
        names: C different names.
        seed: decides who comes into which part; None: the first part has the first names, and so on
            (base and novel classes as in CoCoOp, arXiv 2203.05557, section 4.1).
        parts: how many, 2 to C.

    Returns:
        The parts; within each, the names are in the order given.

    Raises:
        ValueError: a name is given twice, or there are fewer names than parts.

    Example:
        >>> split_classes(["cat", "dog", "hen", "owl", "rat"])
        [['cat', 'dog', 'hen'], ['owl', 'rat']]
    """
    _check_different(names)
    if not 2 <= parts <= len(names):
        raise ValueError(
            f"parts is {parts}; it must be 2 to the number of class names, {len(names)}"
        )
    order = np.arange(len(names))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    return [[names[i] for i in np.sort(part)] for part in np.array_split(order, parts)]


def select_classes(data: Dataset, names: Sequence[str]) -> Dataset:
    """Choose the rows of some classes, and number these classes 0 to k−1 in the order given.

    Args:
        data: has a column "label" of class labels, as `load_images` returns.
        names: k names of its classes.

    Raises:
        ValueError: the data have no such class, or a name is given twice.

    Example:
        >>> base, novel = split_classes(data.features["label"].names)
        >>> select_classes(data, novel).features["label"].names == novel
        True
    """
    _check_different(names)
    known = data.features["label"].names
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        given = f"no class {unknown[0]!r} in the data" if unknown else "no class names are given"
        advice = nearest(unknown[0], known) if unknown else ""
        raise ValueError(f"{given}, its classes are {listing(known)}.{advice}")
    new = np.full(len(known), -1)
    new[[known.index(name) for name in names]] = np.arange(len(names))
    old = np.asarray(data.with_format(None)["label"][:], dtype=int)
    labels = np.where(old < 0, -1, new[old])  # of unlabelled rows, the label is -1
    # Numbered before they are chosen: the pictures of a data set with indices would be copied.
    numbered = data.remove_columns("label").add_column(
        "label",
        labels.clip(min=0),
        feature=require("datasets").ClassLabel(names=list(names)),
    )
    return numbered.select_columns(data.column_names).select(np.flatnonzero(labels >= 0))


def _check_different(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"class names are given more than once: {listing(twice)}")
