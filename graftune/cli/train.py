"""`graftune train`: an adapter, its results and its curves, from a recipe file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import set_seed

from graftune.cli.adapt import adapt, check_method
from graftune.cli.errors import UsageError
from graftune.cli.measure import Metrics, measure, measure_base
from graftune.cli.options import TrainOptions
from graftune.cli.parsing import OptionParser
from graftune.cli.report import console, metrics_table, quiet
from graftune.cli.results import Outcome, write_outcome
from graftune.cli.task import Task, build_task
from graftune.cli.training_options import ELSEWHERE, TrainArguments
from graftune.integrations.extras import require
from graftune.integrations.libraries.base_models import default_objective
from graftune.integrations.sharing import push_to_hub
from graftune.integrations.training import Trainer, last_checkpoint
from graftune.integrations.training.sharding import any_sharded, check_state, whole_state_dict

ADAPTER = "adapter"  # the folder in the output folder
_PACKAGES = ("datasets", "matplotlib", "PIL", "rich")


def run(arguments: Sequence[str]) -> None:
    """Train as a file and the command line say."""
    parser = OptionParser(
        "train",
        "train an adapter as a YAML file says; options of the command line go before the file's",
        [TrainOptions, TrainArguments],
        ELSEWHERE,
    )
    parser.usage = "graftune train [RECIPE.yaml] [--key value] [--key.part value] ..."
    has_file = bool(arguments) and not arguments[0].startswith("-")
    file, rest = (arguments[0], arguments[1:]) if has_file else (None, arguments)
    options, args = parser.parse_with_file(file, rest)
    for package in _PACKAGES:
        require(package)
    train(options, args)


def train(options: TrainOptions, args: TrainArguments) -> None:
    """Train an adapter, measure before and after, and write what came out.

    Args:
        options: what is trained on what.
        args: how, as transformers' trainer takes it.

    Raises:
        UsageError, OSError, ValueError, TypeError, ImportError: something is not there or does not
            fit; before training starts.
        CheckpointError, FloatingPointError, UnreadableImageError: while training; checkpoints that
            were written stay.
    """
    check_method(options)
    if options.push_to is not None:
        validate_repo_id(options.push_to)
    checkpoint = _checkpoint(options.resume, Path(args.output_dir))
    quiet()
    objective = options.objective or default_objective(str(options.model), options.revision)
    set_seed(args.seed)  # new heads and adapters start at random
    task = build_task(options, args, objective)
    model = adapt(task.base, options)
    trainer = _trainer(model, args, task, args.epoch_rates(options.first_epoch_rate))
    say = console().print if trainer.is_world_process_zero() else _say_nothing
    _announce(say, options, args, task, model, checkpoint)

    # Evaluating before training prepares the model once more, which sharded ones do not take; the
    # base model is the same afterwards.
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    before = {} if is_sharded else measure_base(trainer, task.measurements)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    seconds = time.perf_counter() - start
    folder = Path(args.output_dir)
    _save(trainer, folder / ADAPTER)
    before = before or measure_base(trainer, task.measurements)
    after = measure(trainer, task.measurements)
    unreadable = sorted(set(gather_object(getattr(task.collator, "unreadable", []))))
    outcome = Outcome(options, args, task, trainer, before, after, seconds, unreadable, checkpoint)
    if trainer.is_world_process_zero():
        record = write_outcome(outcome, folder, folder / ADAPTER)
        _tell(say, before, after, folder, unreadable)
        if options.push_to is not None:
            say(f"Published: {_publish(options.push_to, args, folder / ADAPTER, record)}")
    trainer.end()


def _checkpoint(resume: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None to start anew."""
    found = last_checkpoint(folder)
    if resume == "auto":
        return found
    if resume is not None:
        if not Path(resume).is_dir():
            raise UsageError(
                f"resume is {resume!r}, which is no folder with a checkpoint, nor auto"
            )
        return Path(resume)
    if found is not None:
        raise UsageError(
            f"{found} is there from an earlier run: say `resume: auto` to go on from it, or choose "
            "another output_dir"
        )
    return None


def _trainer(
    model: PeftModel, args: TrainArguments, task: Task, epoch_rates: list[float] | None
) -> Any:
    measured = task.measurements[0].data if task.measurements else None
    return Trainer(
        model=model,
        args=args,
        objective=task.objective,
        train_dataset=task.train,
        eval_dataset=measured,
        data_collator=task.collator,
        preprocess_logits_for_metrics=getattr(
            task.objective, "preprocess_logits_for_metrics", None
        ),
        epoch_rates=epoch_rates,
    )


def _announce(
    say: Any,
    options: TrainOptions,
    args: TrainArguments,
    task: Task,
    model: PeftModel,
    checkpoint: Path | None,
) -> None:
    trained, total = model.get_nb_trainable_parameters()
    say(f"{options.method} on {options.model}: {trained:,} of {total:,} parameters are trained")
    names = "; ".join(measurement.name for measurement in task.measurements) or "nothing"
    say(f"Training on {len(task.train)} rows by {task.settings['name']}; measuring on {names}")
    if task.base.new_head is not None:
        outputs = len(task.base.outputs)
        say(f"The head {task.base.new_head} is new, for {outputs} classes; it is trained in full")
    if checkpoint is not None:
        say(f"Going on from {checkpoint}")


def _say_nothing(*_: Any) -> None:
    pass


def _save(trainer: Any, folder: Path) -> None:
    """Save the adapter as PEFT does, gathered first where processes have it in parts."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    state = None
    if any_sharded(model):
        state = whole_state_dict(model)
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        if state is not None:
            check_state(model, state)
        model.save_pretrained(str(folder), state_dict=state)


def _tell(say: Any, before: Metrics, after: Metrics, folder: Path, unreadable: list[str]) -> None:
    if after:
        say(metrics_table(before, after))
    if unreadable:
        say(f"{len(unreadable)} pictures could not be read and were left out; see results.json")
    size = (folder / ADAPTER / "adapter_model.safetensors").stat().st_size
    say(f"Written to {folder}: {ADAPTER} ({size / 1024:,.0f} KiB), results.json, curves.png")


def _publish(repository: str, args: TrainArguments, folder: Path, record: Any) -> str:
    try:
        return push_to_hub(
            folder,
            repository,
            record=record,
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision,
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the adapter is saved in {folder} but not published: {error}; try again with "
            f"`graftune push {folder} {repository}`"
        ) from error
