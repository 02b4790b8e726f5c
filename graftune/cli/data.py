"""The data of a run: what is trained on, and what is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.cli.errors import UsageError
from graftune.cli.options import DataOptions, TrainOptions
from graftune.integrations.data import (
    Selection,
    few_shot,
    hold_out,
    load_images,
    load_texts,
    select_classes,
    split_classes,
)
from graftune.integrations.extras import require

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Parts:
    """Rows for training and for measuring, each with their number in the source as "row".

    Args:
        train: what is trained on.
        measured: what is measured on, by name; the first of them while training too.
        class_names: of pictures, the classes trained on, in the order of the labels.
        other_names: of pictures, the classes of the data sets in `of_others`.
        of_others: names of the data sets whose pictures are of classes never trained on.
        selections: what was chosen, to be recorded, by "train" and the names of what is measured.
    """

    train: Dataset
    measured: dict[str, Dataset]
    class_names: list[str] = field(default_factory=list)
    other_names: list[str] = field(default_factory=list)
    of_others: tuple[str, ...] = ()
    selections: dict[str, Selection] = field(default_factory=dict)


def short_name(source: str) -> str:
    """Return what a data set is called in tables."""
    return Path(source).name or source


def pictures(options: DataOptions, source: str, split: str) -> Dataset:
    """Load pictures with the columns that the options name."""
    return load_images(source, image=options.image_column, label=options.label_column, split=split)


def texts(options: DataOptions, source: str, split: str) -> Dataset:
    """Load texts from the column that the options name, with the rows' numbers."""
    data = load_texts(source, text=options.text_column, split=split)
    return data.add_column("row", list(range(len(data))))


def chosen_classes(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of the classes to use.

    Args:
        wanted: names, or one of "all", "first-half" and "second-half" by itself.
        names: those of the data.

    Example:
        >>> chosen_classes(["second-half"], ["cat", "dog", "hen", "owl", "rat"])
        ['owl', 'rat']
    """
    if list(wanted) == ["all"]:
        return list(names)
    if list(wanted) in (["first-half"], ["second-half"]):
        return split_classes(names)[list(wanted) == ["second-half"]]
    return list(wanted)


def parts_of_pictures(options: TrainOptions, seed: int, measure_others: bool) -> Parts:
    """Load pictures and choose what is trained and measured on.

    Args:
        options: the run's.
        seed: decides what is held out, and the shots.
        measure_others: also measure on the classes that are not trained on, if there are any.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or do not have what is asked for.
    """
    data = pictures(options, _data(options), options.split)
    data, measured, name = _split(options, seed, data, pictures)
    names = data.features["label"].names
    classes = chosen_classes(options.classes, names)
    train = select_classes(data, classes)
    if options.shots is not None:
        train = train.select(few_shot(train["label"], options.shots, seed)[0])
    found: dict[str, Dataset] = {}
    others: list[str] = []
    if measured is not None:
        found[name] = _of_classes(measured, classes, name)
        others = [other for other in measured.features["label"].names if other not in classes]
    of_others: tuple[str, ...] = ()
    if measure_others and len(others) > 1:
        of_others = (f"{name}, other classes",)
        found[of_others[0]] = _of_classes(measured, others, name)
    selections = {"train": _selection(options, seed, train, classes, options.shots)}
    for part, rows in found.items():
        selections[part] = _measured_selection(options, seed, rows, rows.features["label"].names)
    return Parts(train, found, classes, others, of_others, selections)


def parts_of_texts(options: TrainOptions, seed: int) -> Parts:
    """Load texts and choose what is trained and measured on.

    A single text has no part that could be held out: then what is measured on is empty here.
    """
    if options.shots is not None:
        raise UsageError("shots is a number of pictures a class; texts have no classes")
    data = texts(options, _data(options), options.split)
    if _holds_out(options) and len(data) == 1:
        return Parts(data, {})
    data, measured, name = _split(options, seed, data, texts)
    found = {} if measured is None else {name: measured}
    selections = {"train": _selection(options, seed, data, (), None)}
    for part, rows in found.items():
        selections[part] = _measured_selection(options, seed, rows, ())
    return Parts(data, found, selections=selections)


def relabelled(data: Dataset, outputs: Sequence[str]) -> Dataset:
    """Number the labels of pictures as a model's outputs are.

    Args:
        data: pictures with class labels.
        outputs: the classes of the outputs, in their order.

    Raises:
        ValueError: the data have a class that is none of them.
    """
    names = data.features["label"].names
    if names == list(outputs):
        return data
    missing = [name for name in names if name not in outputs]
    if missing:
        raise UsageError(
            f"the data have the class {missing[0]!r}, which is none of the model's "
            f"{len(outputs)} outputs; leave it out with `classes`"
        )
    numbers = [outputs.index(name) for name in names]
    labels = [numbers[label] for label in data["label"]]
    feature = require("datasets").ClassLabel(names=list(outputs))
    renamed = data.remove_columns("label").add_column("label", labels, feature=feature)
    return renamed.select_columns(data.column_names)


def _data(options: DataOptions) -> str:
    assert options.data is not None  # checked by the options
    return options.data


def _holds_out(options: TrainOptions) -> bool:
    return not (options.eval_data or options.eval_split) and options.eval_share > 0


def _split(
    options: TrainOptions, seed: int, data: Dataset, load: Callable[[TrainOptions, str, str], Any]
) -> tuple[Dataset, Dataset | None, str]:
    """Return the rows for training, those for measuring, and what the latter are called."""
    source, name = _data(options), short_name(_data(options))
    if _holds_out(options):
        try:
            train, measured = hold_out(data, options.eval_share, seed)
        except ValueError as error:
            raise UsageError(
                f"eval_share of {name}: {error}; or give eval_data, or eval_share 0"
            ) from error
        return train, measured, f"{name}, held out"
    if options.eval_data:
        split = options.eval_split or options.split
        suffix = f", {options.eval_split}" if options.eval_split else ""
        called = f"{short_name(options.eval_data)}{suffix}"
        return data, load(options, options.eval_data, split), called
    if options.eval_split == options.split:
        raise UsageError(f"eval_split is {options.split!r}, which is trained on; give another")
    if options.eval_split:
        return data, load(options, source, options.eval_split), f"{name}, {options.eval_split}"
    return data, None, name


def _of_classes(data: Dataset, names: Sequence[str], what: str) -> Dataset:
    try:
        return select_classes(data, names)
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error


def _selection(
    options: TrainOptions, seed: int, rows: Dataset, names: Sequence[str], shots: int | None
) -> Selection:
    drawn = shots is not None or _holds_out(options)
    return Selection.of(
        rows["row"], _data(options), options.split, seed if drawn else None, shots, names
    )


def _measured_selection(
    options: TrainOptions, seed: int, rows: Dataset, names: Sequence[str]
) -> Selection:
    source = options.eval_data or _data(options)
    split = options.eval_split or options.split
    drawn = seed if _holds_out(options) else None
    return Selection.of(rows["row"], source, split, drawn, None, names)
