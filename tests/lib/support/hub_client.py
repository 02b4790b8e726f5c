"""What a test has a Hub's client do, in a process that knows no other Hub than the local one.

Nothing here imports graftune, transformers or the client before it is called: their addresses and
caches are those of the environment in which they are first imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from support.models import MODELS

CASE = MODELS["transformers-llama"]


@contextmanager
def fresh_process(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Start a process with some environment variables; yields what calls a function in it."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process is there, with this environment
            os.environ.clear()
            os.environ.update(before)
            yield lambda step, *args, **options: pool.submit(step, *args, **options).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def attempt(step: Callable[..., Any], *args: Any, **options: Any) -> tuple[list[str], str]:
    """Return the class names and the message of the error that a step raises."""
    try:
        result = step(*args, **options)
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], f"no error, but {result!r}"


def upload_folder(folder: str, repository: str, **options: Any) -> None:
    """Upload a whole folder as the client does, without graftune."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, **options)


def train(base: str, adapter_name: str = "default", seed: int = 1) -> Any:
    """Wrap a language model by its name or path, with an adapter that does something."""
    import torch
    from transformers import AutoModelForCausalLM

    import graftune

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    return graftune.wrap(model, "flora", adapter_name=adapter_name, r=2, init_weights=False)


def train_and_save(base: str, folder: str, **options: Any) -> list[Any]:
    """Save such an adapter; returns what the model answers."""
    model = train(base, **options).eval()
    model.save_pretrained(folder)
    return CASE.run(model, CASE.batch()).tolist()


def train_and_push(base: str, repository: str, seed: int = 1, **options: Any) -> str:
    """Push such an adapter as a model; options with `adapter_name` name it."""
    from graftune.integrations.sharing import push_to_hub

    name = options.pop("adapter_name", "default")
    return push_to_hub(train(base, name, seed), repository, **options)


def push(folder: str, repository: str, **options: Any) -> str:
    from graftune.integrations.sharing import push_to_hub

    return push_to_hub(folder, repository, **options)


def push_by_peft(base: str, repository: str, **options: Any) -> None:
    """Push an adapter as PEFT's users do."""
    train(base, **options).push_to_hub(repository)


def push_by_trainer(base: str, repository: str, folder: str) -> None:
    """Train for a step and push as transformers' trainer does."""
    from transformers import TrainingArguments

    import graftune

    hub = {"push_to_hub": True, "hub_model_id": repository, "hub_strategy": "end"}
    args = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to="none", **hub)
    rows = [{"input_ids": row, "labels": row} for row in CASE.batch()["input_ids"].tolist()]
    trainer = graftune.Trainer(train(base), args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()


def answers(adapter: str, **options: Any) -> list[Any]:
    """What the small model answers with an adapter loaded by graftune."""
    import graftune

    model = graftune.load(CASE.build(), adapter, **options).eval()
    return CASE.run(model, CASE.batch()).tolist()


def answers_by_peft(adapter: str, **options: Any) -> list[Any]:
    """The same through PEFT's own entry points."""
    from peft import PeftConfig, PeftModel

    import graftune

    config = PeftConfig.from_pretrained(adapter, **options)
    assert isinstance(config, graftune.FloraConfig)
    model = PeftModel.from_pretrained(CASE.build(), adapter, **options).eval()
    return CASE.run(model, CASE.batch()).tolist()


def answers_by_code(code: str) -> list[Any]:
    """The same by the code of a model card, in a process that has not imported graftune."""
    assert "graftune" not in sys.modules
    names: dict[str, Any] = {}
    exec(code, names)
    return CASE.run(names["model"].eval(), CASE.batch()).tolist()
