"""Small training runs, to be killed, resumed, split over processes and compared."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

import graftune
from graftune.adapters.regularizers import Gradients, Need, Regularizer, Run, Step
from graftune.adapters.regularizers.base import State
from support.clip import COLOURS, clip, colours
from support.models import MODELS

DEFAULTS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_steps": 4,
}


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    """Training arguments for a CPU, with nothing saved or reported unless asked for."""
    return TrainingArguments(str(folder), **{**DEFAULTS, **overrides})


@dataclass
class Wandering(Regularizer):
    """Has every kind of state: random numbers, a running mean, a count of epochs.

    Whatever of it is lost shows in the weights.
    """

    name: ClassVar[str] = "test_wandering"

    def __post_init__(self) -> None:
        self._noise = torch.Generator()
        self._mean = torch.zeros(())
        self._epochs: list[int] = []

    def start(self, run: Run) -> None:
        # By process: what one of them draws the others do not.
        self._noise.manual_seed(7 + int(os.environ.get("RANK", "0")))
        self._mean, self._epochs = torch.zeros(()), []

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        logits = step.outputs["logits"].float()
        self._mean = 0.9 * self._mean + 0.1 * logits.detach().mean()
        noise = torch.randn((), generator=self._noise)
        weight = 0.1 * (1 + len(self._epochs)) * noise
        return {"wandering": weight * (logits.mean() - self._mean)}

    def epoch_end(self, run: Run, epoch: int) -> None:
        self._epochs.append(epoch)

    def end(self, run: Run) -> None:
        with torch.no_grad():
            for parameter in run.trained().values():
                parameter.mul_(1 + 0.01 * len(self._epochs))

    def state_dict(self) -> State:
        return {"noise": self._noise.get_state(), "mean": self._mean, "epochs": self._epochs}

    def load_state_dict(self, state: State) -> None:
        self._noise.set_state(state["noise"])
        self._mean, self._epochs = state["mean"], list(state["epochs"])


@dataclass
class Opposing(Regularizer):
    """Takes from the gradient what opposes that of a term of its own, as gradient surgery does."""

    name: ClassVar[str] = "test_opposing"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.TERM_GRADIENTS, Need.FROZEN})

    def separate_terms(self, step: Step) -> Mapping[str, Tensor]:
        assert step.frozen is not None
        distance = (step.outputs["logits"].float() - step.frozen["logits"].float()).square()
        mask = step.outputs.get("mask")
        own = distance.mean(-1)
        counts = mask is not None and mask.shape == own.shape
        return {"distance": step.mean(own, mask) if counts else own.mean()}

    def transform_gradients(self, gradients: Gradients) -> None:
        for parameter, other in zip(
            gradients.parameters, gradients.of_terms["distance"], strict=True
        ):
            if parameter.grad is not None and other is not None:
                parameter.grad.add_(other, alpha=0.5)
                parameter.grad.mul_((parameter.grad * other >= 0) * 0.5 + 0.5)


def adapted(method: str, model: str = "transformers-clip", **options: Any) -> Any:
    """A small model with an adapter that has dropout."""
    torch.manual_seed(1)
    config: Any = "flora"
    options = {"r": 4, "dropout": 0.1, **options}
    if method == "lora":
        config = LoraConfig(r=4, lora_dropout=options["dropout"], target_modules="all-linear")
        options = {}
    if method == "mask_tuning":
        config = method
        options = {name: value for name, value in options.items() if name not in ("r", "dropout")}
    if method == "stack":
        prompts = graftune.DeepPromptConfig(
            num_tokens_text=1, num_tokens_vision=1, depth_text=1, depth_vision=2, init_text=None
        )
        lora = LoraConfig(r=4, lora_dropout=options["dropout"], target_modules="all-linear")
        with_prompts = [prompts] if model == "transformers-clip" else []
        config, options = [*with_prompts, lora, "mask_tuning"], {}
    return graftune.wrap(MODELS[model].build(), config, **options)


class Augmented(Dataset):
    """Pictures that come out differently each time, by every kind of random numbers."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.rows[index]["pixel_values"]
        noise = torch.randn(pixels.shape) * random.random() * np.random.rand()
        return {**self.rows[index], "pixel_values": pixels + noise.float()}


def shifting(rows: Any) -> dict[str, Tensor]:
    """A collator that shifts the pictures by some random pixels."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    shifted = pixels.roll(int(torch.randint(8, ())), dims=-1)
    return {"pixel_values": shifted, "labels": torch.tensor([row["labels"] for row in rows])}


def colour_run(
    folder: Path,
    *,
    regularizers: list[Any] | None = None,
    method: str = "flora",
    rows: int = 20,
    dropout: float = 0.1,
    fraction: float | None = None,
    **overrides: Any,
) -> graftune.Trainer:
    """A run that tells colours by their names, by pictures that are drawn anew each time."""
    return graftune.Trainer(
        adapted(method, dropout=dropout, **({"fraction": fraction} if fraction else {})),
        arguments(folder, **overrides),
        objective=graftune.ClassNameClassifier(list(COLOURS), clip()[1]),
        train_dataset=Augmented(colours(rows)),
        data_collator=shifting,
        eval_dataset=colours(8, seed=1),
        regularizers=regularizers or [],
    )


def with_state() -> list[Regularizer]:
    """Regularizers that have something to lose."""
    return [
        Wandering(),
        graftune.FrozenDistillation(0.5),
        graftune.L2ToStart(0.1),
        Opposing(),
        graftune.GradientDropout(0.5),
    ]


def weights(run: Any) -> dict[str, Tensor]:
    """The trained weights by name."""
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def losses(run: Any) -> list[float]:
    """The logged losses."""
    return [row["loss"] for row in run.state.log_history if "loss" in row]


# Runs to be split over processes.


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Sentences of one length, of which more and more tokens are not to be predicted."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 60, (count, 8), generator=generator)
    ignored = torch.arange(8)[None] < (torch.arange(count) * 5 % 8)[:, None]
    labels = tokens.masked_fill(ignored, -100)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def pictures(count: int, classes: int) -> list[dict[str, Any]]:
    """Noisy pictures, some of them without a label that counts."""
    labels = [index % classes if index % 3 else -100 for index in range(count)]
    return [{**row, "labels": y} for row, y in zip(colours(count), labels, strict=True)]


def _class_names() -> Any:
    return graftune.ClassNameClassifier(list(COLOURS), clip()[1])


@dataclass(frozen=True)
class Case:
    """A kind of training: a model, an objective or its own loss, data, regularizers."""

    model: str
    objective: Any
    rows: Any
    regularizers: Any = list
    accumulated: int = 1
    method: str = "flora"
    overrides: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "class names": Case("transformers-clip", _class_names, lambda: colours(16)),
    "class names, regularized, labels missing": Case(
        "transformers-clip",
        _class_names,
        lambda: pictures(16, 4),
        lambda: [
            graftune.FrozenDistillation(2.0, of="features"),
            graftune.L2ToStart(0.1),
            Opposing(),
        ],
    ),
    "class names, gradients dropped, labels missing": Case(
        "transformers-clip",
        _class_names,
        lambda: pictures(16, 4),
        lambda: [graftune.GradientDropout(1.0), graftune.L2ToStart(0.1)],
        accumulated=2,
        method="lora",
    ),
    "class names, prompts and LoRA and masks": Case(
        "transformers-clip",
        _class_names,
        lambda: pictures(16, 4),
        lambda: [graftune.GradientDropout(0.5), graftune.MaskNorm(0.01)],
        method="stack",
    ),
    "class names, LoRA, accumulated": Case(
        "transformers-clip",
        _class_names,
        lambda: pictures(16, 4),
        lambda: [graftune.FrozenDistillation(2.0), graftune.L2ToStart(0.01, of="merged")],
        accumulated=2,
        method="lora",
    ),
    "causal LM, regularized": Case(
        "transformers-llama",
        graftune.CausalLM,
        lambda: sentences(16),
        lambda: [
            graftune.FrozenDistillation(2.0),
            graftune.L2ToStart(0.1, of="merged"),
            graftune.GradientDropout(0.5, of="loss"),
        ],
    ),
    "causal LM, own loss, accumulated": Case(
        "transformers-llama",
        lambda: None,
        lambda: sentences(16),
        lambda: [
            graftune.FrozenDistillation(2.0, of="features"),
            graftune.L2ToStart(0.1),
            Opposing(),
        ],
        accumulated=2,
    ),
    "image classification, regularized": Case(
        "transformers-vit",
        graftune.ImageClassifier,
        lambda: pictures(16, 5),
        lambda: [graftune.FrozenDistillation(2.0), Opposing()],
        accumulated=2,
    ),
    "class names, recomputed": Case(
        "transformers-clip",
        _class_names,
        lambda: pictures(16, 4),
        lambda: [graftune.FrozenDistillation(2.0), Opposing()],
        overrides={"gradient_checkpointing": True},
    ),
    "causal LM, recomputed by reentrance": Case(
        "transformers-llama",
        graftune.CausalLM,
        lambda: sentences(16),
        overrides={
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
}


def case_run(name: str, folder: Path, **overrides: Any) -> graftune.Trainer:
    """A run of eight rows a step, of however many processes, by gradient descent.

    Weights then differ as gradients do; Adam would make much of the sign of what is nearly zero.
    """
    case = CASES[name]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return graftune.Trainer(
        adapted(case.method, case.model, dropout=0.0),
        arguments(
            folder,
            **{
                "per_device_train_batch_size": 8 // processes // case.accumulated,
                "gradient_accumulation_steps": case.accumulated,
                "optim": "sgd",
                "learning_rate": 0.1,
                **case.overrides,
                **overrides,
            },
        ),
        objective=case.objective(),
        train_dataset=case.rows(),
        regularizers=case.regularizers(),
    )


def split_runs(folder: Path) -> None:
    """Do every run and leave its losses and the weights that this process ended with."""
    found = {}
    for name in CASES:
        run = case_run(name, folder)
        run.train()
        logged = [key for key in run.state.log_history[0] if key not in ("epoch", "step")]
        rows = [[row[key] for key in logged] for row in run.state.log_history[:-1]]
        found[name] = {"logged": logged, "rows": rows, "weights": weights(run)}
    torch.save(found, folder / f"found-{os.environ.get('RANK', '0')}.pt")


class Killer(TrainerCallback):
    """Kills its process, as the system does when memory is short, at one place of a run."""

    def __init__(self, where: str, step: int, rank: int = 0) -> None:
        self._where, self._step, self._rank = where, step, rank

    def kill_at(self, where: str, step: int) -> None:
        """Kill this process if it is the one to be killed, here and now."""
        own = int(os.environ.get("RANK", "0"))
        if (where, step, own) == (self._where, self._step, self._rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("begin", state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("substep", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("gradient", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("end", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("saved", state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("epoch", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill_at("done", state.global_step)


def kill_while_saving(run: Any, killer: Killer) -> None:
    """Let a run be killed between the files of a checkpoint, and before and after its move."""
    from graftune.integrations.training import checkpoints

    def stop_around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def stopping(*args: Any, **kwargs: Any) -> Any:
            killer.kill_at(f"before {name}", run.state.global_step)
            result = original(*args, **kwargs)
            killer.kill_at(f"after {name}", run.state.global_step)
            return result

        setattr(owner, name, stopping)

    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        stop_around(run, name)
    for name in ("list_files", "move"):
        stop_around(checkpoints, name)


def go_on(folder: Path, kill: tuple[str, int, int] | None, options: dict[str, Any]) -> None:
    """Go on with a run, or start it, until it is done or killed; keep the adapter it ends with."""
    run = colour_run(folder, regularizers=with_state(), **options)
    if kill is not None:
        killer = Killer(*kill)
        run.add_callback(killer)
        kill_while_saving(run, killer)
    run.train(resume_from_checkpoint=graftune.last_checkpoint(folder))
    run.save_model(str(folder / "final"))


def train_with_a_limit(folder: Path) -> None:
    """Train until a file of a checkpoint would grow beyond a limit, and go on without the limit."""
    import resource

    from graftune.integrations.training import CheckpointError

    saving = {"save_strategy": "steps", "save_steps": 1}
    colour_run(folder, **saving, max_steps=2).train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
    message = ""
    try:
        colour_run(folder, **saving, max_steps=5).train(resume_from_checkpoint=True)
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "could not write checkpoint-3" in message
    assert f"the last good one is {folder / 'checkpoint-2'}" in message
    assert "\n" not in message
    colour_run(folder, **saving, max_steps=5).train(resume_from_checkpoint=True)
