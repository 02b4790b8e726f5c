"""Where rows come from: a data set of the Hub, one saved in a folder, or an object."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.extras import require

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(source: Any, split: str, kinds: str) -> Dataset:
    """Return one split of a data set that is an object, in a folder, or on the Hub.

    Args:
        source: a `datasets.Dataset` (which has no splits: `split` is not looked at) or
            `DatasetDict`, a folder that `save_to_disk` wrote, or the name of a data set on the Hub.
        split: which part of it.
        kinds: what else the caller takes, for the errors.

    Raises:
        FileNotFoundError: no such file, folder or data set.
        ConnectionError: the Hub cannot be reached.
        TypeError: the source is none of these, or streams.
        ValueError: it has no such split.
    """
    datasets = require("datasets")
    if isinstance(source, datasets.Dataset):
        return source.with_format(None)
    if isinstance(source, datasets.DatasetDict):
        check_split(split, source)
        return source[split].with_format(None)
    if isinstance(source, str | Path):
        found = saved(source) or _from_hub(str(source), split, kinds)
        return open_source(found, split, kinds)
    raise TypeError(
        f"data of type {type(source).__name__} are not known; give {kinds}, the name of a data set "
        "on the Hub, a datasets.Dataset or a DatasetDict (one that streams has no rows to choose "
        "from: load it without streaming)"
    )


def saved(source: str | Path) -> Any:
    """Return the data set that `save_to_disk` wrote into a folder, None if it is no such folder."""
    folder = Path(source).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return require("datasets").load_from_disk(folder)
    return None


def _from_hub(name: str, split: str, kinds: str) -> Dataset:
    nowhere = f"there is no file or folder {name}; give {kinds}, or the name of a data set"
    if Path(name).expanduser().exists():
        raise FileNotFoundError(f"{name} does not hold what is needed here; give {kinds}")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{nowhere} on the Hub")
    try:
        return require("datasets").load_dataset(name, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{nowhere} that is on the Hub ({error})") from error
    except ConnectionError as error:
        raise ConnectionError(f"{nowhere} when the Hub can be reached ({error})") from error


def check_split(split: str, allowed: Iterable[str]) -> None:
    """Raise a ValueError for a split that is not there."""
    names = list(allowed)
    if split not in names:
        raise ValueError(
            f"split {split!r} is not in the data, only {listing(names)}.{nearest(split, names)}"
        )


def check_column(name: str, data: Dataset, argument: str, function: str) -> None:
    """Raise a ValueError for a column that is not there."""
    if name not in data.column_names:
        columns = list(data.column_names)
        raise ValueError(
            f"no column {name!r} in the data, only {listing(columns)}.{nearest(name, columns)} "
            f"Name it: {function}(..., {argument}=...)"
        )
