"""What a protocol trains and asks, seed by seed."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import TrainingArguments, set_seed

from graftune.integrations.data.images import ImageCollator
from graftune.integrations.data.sampling import Selection, few_shot
from graftune.integrations.objectives import ClassNameClassifier
from graftune.integrations.training import Trainer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Study:
    """An adapter of a CLIP and how it is trained, the same for every seed of a protocol.

    Args:
        wrap: makes a freshly adapted model: what `graftune.wrap` returns, of a base model that was
            loaded anew or taken out of an adapter by `unload()`. Called after the seed is set.
        processor: the model's processor, or for open_clip its image transform.
        arguments: training arguments; the seed is replaced by the protocol's.
        tokenizer: the model's tokenizer, where the processor has none.
        template: one text, or several, each with `{}` where the class name goes.
        epoch_rates: the learning rate of each epoch, in the place of the arguments' schedule.

    Example:
        >>> def wrap():
        ...     return graftune.wrap(CLIPModel.from_pretrained(name), "promptsrc")
        >>> study = Study(wrap, CLIPProcessor.from_pretrained(name), TrainingArguments("out"))
        >>> base_to_novel(study, load_images("flowers"), shots=16, seeds=(1, 2, 3)).summary()
    """

    wrap: Callable[[], PeftModel]
    processor: Any
    arguments: TrainingArguments
    tokenizer: Any = None
    template: str | Sequence[str] = "a photo of a {}."
    epoch_rates: Sequence[float] | None = None

    def objective(self, class_names: Sequence[str]) -> ClassNameClassifier:
        """Return the objective for a list of classes."""
        tokenizer = self.processor if self.tokenizer is None else self.tokenizer
        return ClassNameClassifier(class_names, tokenizer, self.template)

    def fit(self, train: Dataset, seed: int) -> Trainer:
        """Train on a data set, and return the trainer, whose model is adapted."""
        set_seed(seed)
        arguments = copy.copy(self.arguments)
        arguments.seed = seed
        # Nothing of a protocol's runs is kept but their numbers.
        arguments.save_strategy = "no"
        with tempfile.TemporaryDirectory() as folder:
            arguments.output_dir = folder
            trainer = Trainer(
                self.wrap(),
                arguments,
                objective=self.objective(train.features["label"].names),
                train_dataset=train,
                data_collator=ImageCollator(self.processor),
                epoch_rates=self.epoch_rates,
            )
            trainer.train()
        return trainer

    def accuracy(self, trainer: Trainer, data: Dataset) -> float:
        """Return the accuracy in percent on a data set, among its own classes."""
        trainer.objective = self.objective(data.features["label"].names)
        return 100 * trainer.evaluate(data)["eval_accuracy"]


@dataclass
class ProtocolResult:
    """The numbers of a protocol: one row a run, with what it was trained on.

    Args:
        protocol: its name.
        rows: measures in percent by name, with the seed and whatever tells runs apart.
        selections: what each run was trained on.
        measured: what each run was measured on, by the name of the measure.
        measures: the names of the measures.
    """

    protocol: str
    measures: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    measured: list[dict[str, Selection]] = field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """Return mean and standard deviation over the seeds of every measure, for each setting.

        Settings are what beside seed and measures is in the rows, such as the number of shots.
        """
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            setting = {k: v for k, v in row.items() if k not in ("seed", *self.measures)}
            groups.setdefault(tuple(setting.items()), []).append(row)
        return [
            {**dict(setting), **{m: _mean_and_std([r[m] for r in rows]) for m in self.measures}}
            for setting, rows in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can say it."""
        selections = [dataclasses.asdict(selection) for selection in self.selections]
        measured = [
            {name: dataclasses.asdict(selection) for name, selection in of_run.items()}
            for of_run in self.measured
        ]
        return {
            "protocol": self.protocol,
            "rows": self.rows,
            "summary": self.summary(),
            "selections": selections,
            "measured": measured,
        }


def draw_shots(
    data: Dataset, shots: int, seed: int, source: object
) -> tuple[Dataset, Dataset, Selection]:
    """Return a few rows of each class, all others, and the record of what was chosen."""
    chosen, rest = few_shot(data["label"], shots, seed)
    train = data.select(chosen)
    return train, data.select(rest), recorded(train, source, seed=seed, shots=shots)


def numbered(data: Dataset) -> Dataset:
    """Return a data set with the numbers of its rows in the column "row", as `load_images` does."""
    if "row" in data.column_names:
        return data
    return data.add_column("row", list(range(len(data))))


def recorded(
    data: Dataset, source: object, seed: int | None = None, shots: int | None = None
) -> Selection:
    """Return the record of the rows of a numbered data set."""
    names = data.features["label"].names
    return Selection.of(data["row"], source, seed=seed, shots=shots, class_names=names)


def _mean_and_std(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation}
