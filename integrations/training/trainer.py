"""The public trainer and its mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import DistributedDataParallelKwargs
from peft import PeftModel

from graftune.integrations.libraries.recomputing import checkpointing, is_reentrant
from graftune.integrations.sharing import read_record, refresh_card
from graftune.integrations.training.checkpoints import WholeCheckpoints
from graftune.integrations.training.finite import FiniteLoss
from graftune.integrations.training.objective import ObjectiveTrainer
from graftune.integrations.training.rates import EpochRates
from graftune.integrations.training.regularized import RegularizedTrainer
from graftune.integrations.training.seeded import SeededData
from graftune.integrations.training.selecting import SelectingTrainer
from graftune.integrations.training.sharding import any_sharded, check_state, whole_state_dict


class TrainerMixin(
    EpochRates, FiniteLoss, RegularizedTrainer, SelectingTrainer, WholeCheckpoints, SeededData
):
    """Everything that graftune adds to a trainer of transformers' or TRL's, objectives apart.

    Regularizers (`regularizers=`, or those that the adapter's config records), checkpoints that are
    whole or not there, random transforms of data that can be resumed, an end in one line when the
    loss is not finite, and training arguments saved as JSON instead of a pickle.

    Args:
        *args: the trainer's own.
        regularizers: objects, or dicts with their name and settings. None takes those that the
            adapter's config records; an empty list trains without.
        epoch_rates: the learning rate of each epoch (`graftune.integrations.schedules`), in the
            place of the training arguments' schedule.
        **kwargs: the trainer's own.

    Example:
        >>> from trl import SFTTrainer
        >>> class Regularized(graftune.TrainerMixin, SFTTrainer): ...
        >>> Regularized(model, args=SFTConfig("out"), train_dataset=data,
        ...             regularizers=[graftune.FrozenDistillation(0.5)]).train()
    """

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        for handler in built["kwargs_handlers"]:
            # As transformers does for models without an adapter: looking for unused parameters
            # breaks reentrant checkpointing.
            unsaid = self.args.ddp_find_unused_parameters is None and is_reentrant(self.args)
            if unsaid and isinstance(handler, DistributedDataParallelKwargs):
                handler.find_unused_parameters = False
        return built

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; resuming and what it raises are those of `Trainer`."""
        model: Any = self.model
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # An evaluation before training marks the model as prepared without wrapping it, and
            # accelerate takes the mark's word: each of several processes would train by itself.
            vars(model).pop("_is_accelerate_prepared", None)
        with checkpointing(model, self.args):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter as transformers does; whole, also where it is sharded."""
        model: Any = self.model
        if not any_sharded(model):
            super().save_model(output_dir, _internal_call)
            return
        # transformers gathers the base model as well, or with sharded states saves no adapter.
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write transformers' card of the run, with graftune's part above its text."""
        folder = Path(str(self.args.output_dir))
        record = read_record(folder)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            refresh_card(folder, record)

    def end(self) -> None:
        """End the run as the trainer does, in all processes together: call it last in a script.

        A process that ended while another was still writing, or whose process group outlived
        Python because DDP's wrapper held it, would be aborted at times by gloo's threads.
        """
        self.accelerator.wait_for_everyone()
        model: Any = self.model
        self.model_wrapped = model
        self.accelerator.free_memory()
        super().end()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        args = self.args
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            if any_sharded(model):
                state_dict = whole_state_dict(model)
            if args.should_save and state_dict is not None:
                check_state(model, state_dict)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(args.output_dir))
        if args.should_save and (folder / "training_args.bin").exists():
            (folder / "training_args.bin").unlink()
            (folder / "training_args.json").write_text(args.to_json_string())


class Trainer(TrainerMixin, ObjectiveTrainer):
    """Train an adapter by an objective, with regularizers, under Accelerate.

    This is `transformers.Trainer`: arguments, data sets, callbacks, evaluation, checkpoints and
    resuming are its own, and so is what `accelerate launch` offers. What differs:

    - The loss is the objective's, which calls the model through all its wrappers (DDP, FSDP,
      torch.compile, autocast). Labels are in the column "labels"; columns reach a data collator of
      your own untouched; the objective's metrics are reported unless `compute_metrics` is given.
    - Regularizers add terms to the loss and change gradients; `TrainerMixin` has the same for other
      trainers. What they need of the frozen model is computed once a batch.
    - Batch normalisations whose parameters are frozen stay in evaluation mode, so that the base
      model's running statistics stay what they were. Dropout of the base model is active in
      training, as with transformers.
    - A loss that is not finite ends the training in one error; checkpoints stay as they are.
    - A checkpoint is written aside and moved into place: it is whole or it is not there. A run that
      is killed and resumed ends with the same adapter, bit for bit on a CPU.
    - Random transforms of the training data (by Python's, NumPy's or torch's global random numbers)
      follow from seed, epoch and row: the same after resuming, in any number of processes.
    - Training arguments are saved as training_args.json instead of a pickle.

    Args:
        *args: those of `transformers.Trainer`; `model` is what `graftune.wrap` returned.
        objective: a module without weights, called as `objective(model, **inputs)` with the
            collated batch, as `graftune.integrations.objectives` says. None: the model's own loss.
        regularizers: objects, or dicts with their name and settings. None takes those that the
            adapter's config records; an empty list trains without.
        epoch_rates: the learning rate of each epoch (`graftune.integrations.schedules`), in the
            place of the training arguments' schedule.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: nothing in the model is trainable, the objective has trainable weights, a
            regularizer is unknown, or there are not as many `epoch_rates` as epochs.
        TypeError: a regularizer is not defined for the model.
        FloatingPointError: when training, the loss is not finite; names the step and the batch.
        CheckpointError: when training, a checkpoint could not be written; the last one is intact.

    Example:
        >>> model = graftune.wrap(clip, "flora", regularizers=[graftune.FrozenDistillation()])
        >>> objective = graftune.ClassNameClassifier(class_names, processor)
        >>> trainer = graftune.Trainer(model, TrainingArguments("out"), objective=objective,
        ...                            train_dataset=data, data_collator=ImageCollator(processor))
        >>> trainer.train()
        >>> model.save_pretrained("my-adapter")
    """
