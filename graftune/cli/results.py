"""What a run leaves behind: results.json, the record in the adapter's card, and the curves."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftune.cli.curves import draw
from graftune.cli.data import short_name
from graftune.cli.measure import Metrics
from graftune.cli.options import TrainOptions
from graftune.cli.report import write_json
from graftune.cli.task import HUB_TASKS, Task
from graftune.cli.training_options import TrainArguments
from graftune.integrations.sharing import TrainingRecord, describe, write_record

# What of transformers' training arguments it takes to do a run again.
_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Outcome:
    """A run that is over.

    Args:
        options: what was trained on what.
        args: how.
        task: model, objective and data.
        trainer: the trainer.
        before: metrics of the base model.
        after: metrics of the adapted model.
        seconds: wall-clock time of the training, since it was resumed if it was.
        unreadable: the pictures that were left out.
        resumed_from: the checkpoint that the run went on from.
    """

    options: TrainOptions
    args: TrainArguments
    task: Task
    trainer: Any
    before: Metrics
    after: Metrics
    seconds: float
    unreadable: list[str]
    resumed_from: Path | None


def write_outcome(outcome: Outcome, folder: Path, adapter: Path) -> TrainingRecord:
    """Write results.json and curves.png, and the record into the adapter's card; return it.

    Args:
        outcome: the run.
        folder: where the results go.
        adapter: the saved adapter's folder.
    """
    record = training_record(outcome)
    write_record(adapter, record)
    write_json(results(outcome, record, adapter), folder / "results.json")
    title = f"{outcome.options.method} on {short_name(str(outcome.options.model))}"
    draw(history(outcome), folder / "curves.png", title)
    return record


def history(outcome: Outcome) -> list[dict[str, Any]]:
    """Return what the trainer has logged, after the base model's metrics as step 0."""
    first = next(iter(outcome.before.values()), {})
    start = {"step": 0, **{f"eval_{name}": value for name, value in first.items()}}
    return [start, *outcome.trainer.state.log_history]


def results(outcome: Outcome, record: TrainingRecord, adapter: Path) -> dict[str, Any]:
    """Return the content of results.json."""
    facts = describe(adapter)
    trained, total = outcome.trainer.model.get_nb_trainable_parameters()
    selections = outcome.task.selections
    return {
        "config": config(outcome),
        "objective": record.objective,
        "regularizers": record.regularizers,
        "metrics": {"before": outcome.before, "after": outcome.after},
        "data": {name: dataclasses.asdict(part) for name, part in selections.items()},
        "unreadable": outcome.unreadable,
        "adapter": {
            "method": facts.method,
            "trained_parameters": trained,
            "all_parameters": total,
            "stored_parameters": facts.parameters,
            "bytes": facts.bytes,
        },
        "seed": outcome.args.seed,
        "steps": record.steps,
        "epochs": record.epochs,
        "seconds": record.seconds,
        "peak_memory_bytes": peak_memory(),
        "resumed_from": outcome.resumed_from,
        "versions": record.versions,
        "hardware": {**record.hardware, "processes": outcome.args.world_size},
        "log_history": outcome.trainer.state.log_history,
    }


def config(outcome: Outcome) -> dict[str, Any]:
    """Return every option of the run by its name, tokens left out."""
    known = {f.name for f in dataclasses.fields(outcome.args) if f.init}
    arguments = {name: v for name, v in outcome.args.to_dict().items() if name in known}
    return {**dataclasses.asdict(outcome.options), **arguments}


def training_record(outcome: Outcome) -> TrainingRecord:
    """Return what the adapter's card says of the run."""
    args, state, task = outcome.args, outcome.trainer.state, outcome.task
    regularizers = outcome.trainer.regularization.regularizers
    given = args.to_dict()
    return TrainingRecord(
        method=outcome.options.method,
        regularizers=[regularizer.to_dict() for regularizer in regularizers],
        objective=task.settings,
        task=HUB_TASKS[task.settings["name"]],
        data={name: dataclasses.asdict(part) for name, part in task.selections.items()},
        hyperparameters={
            **{name: given[name] for name in _HYPERPARAMETERS if given[name] is not None},
            "processes": args.world_size,
            "precision": args.mixed_precision if args.mixed_precision != "no" else "float32",
            "base_dtype": outcome.options.dtype,
        },
        seed=args.seed,
        steps=state.global_step,
        epochs=state.epoch,
        metrics={name: _with_before(outcome, name) for name in outcome.after},
        seconds=round(outcome.seconds, 3),
    )


def _with_before(outcome: Outcome, name: str) -> dict[str, float]:
    after, before = outcome.after[name], outcome.before.get(name, {})
    return {**after, **{f"{metric} of the base model": value for metric, value in before.items()}}


def peak_memory() -> int | None:
    """Return the most memory in use so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
