"""Random numbers of the data that do not depend on when a batch is fetched, or by which process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from graftune.integrations.training.base import SomeTrainer


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Let Python's, NumPy's and torch's global random numbers follow from a key, for a while."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = random.Random(str(key)).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Rows(list):
    """The rows of a batch, and where they come from."""

    key: tuple[int, ...] = ()


class SeededRows(Dataset):
    """A data set whose random transforms follow from the seed, the epoch and the row.

    Batches are fetched ahead, between others' dropout, and fetched anew when a run is resumed: with
    the run's own random numbers they would come out differently.

    Args:
        rows: a map-style data set.
        seed: of the data.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with loading processes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> Rows:
        """Return the rows of a batch."""
        place = (self.seed, int(self.epoch))
        if hasattr(self.rows, "__getitems__"):
            with seeded(*place, *indices):
                batch = Rows(self.rows.__getitems__(indices))
        else:
            batch = Rows()
            for index in indices:
                with seeded(*place, index):
                    batch.append(self.rows[index])
        batch.key = (*place, *indices)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "rows":  # before there is anything, as when a process unpickles it
            raise AttributeError(name)
        return getattr(self.rows, name)


class SeededCollator:
    """A collator whose random choices follow from the rows that it is given."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        """Collate a batch."""
        if not isinstance(rows, Rows):
            return self.collator(rows)
        with seeded(*rows.key, -1):
            return self.collator(list(rows))


class SeededData(SomeTrainer):
    """Mixin for transformers' trainers: random transforms of training data can be resumed.

    Those that use the global random numbers of Python, NumPy or torch, in the data set or in the
    collator. Data sets that can only be iterated stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = _Epoch()
        self.add_callback(self._epoch)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if is_training and _is_map_style(dataset):
            if hasattr(dataset, "column_names"):
                dataset = self._remove_unused_columns(dataset, description=description)
            if sampler_fn is not None:
                sampler_fn = _sampler_of(dataset, sampler_fn)
            args = self.args
            dataset = SeededRows(dataset, args.seed if args.data_seed is None else args.data_seed)
            self._epoch.of = dataset
        return super()._get_dataloader(
            dataset, description, batch_size, sampler_fn, is_training, dataloader_key
        )

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        return SeededCollator(collator)


class _Epoch(TrainerCallback):
    """Tells the data set which epoch it is."""

    of: SeededRows | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.of is not None:
            self.of.epoch.fill_(int(state.epoch or 0))


def _is_map_style(dataset: Any) -> bool:
    has_rows = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return has_rows and not isinstance(dataset, IterableDataset)


def _sampler_of(dataset: Any, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A sampler may look for the columns of the data set itself."""
    return lambda _: make(dataset)
