"""PromptSRC in a training loop of one's own, under Accelerate: no trainer, about thirty lines.

    accelerate launch examples/custom_loop.py
    torchrun --nproc_per_node 2 examples/custom_loop.py --resume

The recipe of `clip_promptsrc.py` (arXiv 2307.06948): deep prompts, both regularizers, SGD with a
learning rate for each epoch. Adapts the embedded CLIP to drawings of a style that it has never
seen, with accumulated batches, in as many processes as it is launched with, and with a state after
each epoch that `--resume` goes on from.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader

import graftune
from embedded.model import load_clip
from embedded.pictures import load_style
from graftune.integrations.data import ImageCollator
from graftune.integrations.schedules import cosine_rates

ACCUMULATED = 2
RATE, FIRST_EPOCHS_RATE = 0.0025, 1e-5
# The template's words before the name are what the prompts start as.
TEMPLATE = "a picture of {}"
PROMPTS = {"init_text": "a picture of", "num_tokens_text": 3, "depth_text": 3, "depth_vision": 5}


def drawings(count: int) -> tuple[list[dict], list[str]]:
    """Pictures with labels, and the names of the classes: here each picture is one."""
    style = load_style("openmoji")
    rows = [{"image": Image.fromarray(style.images[i]), "label": i} for i in range(count)]
    return rows, [emoji.name for emoji in style.emoji[:count]]


def adapted(epochs: int) -> tuple[Any, Any, list[graftune.Regularizer]]:
    """The embedded CLIP with prompts, its processor, and what keeps the prompts honest."""
    clip, processor = load_clip()
    regularizers = [graftune.SelfRegulation(), graftune.GaussianAveraging(0.75 * epochs, std=1)]
    model = graftune.wrap(
        clip, "promptsrc", tokenizer=processor, regularizers=regularizers, **PROMPTS
    )
    return model, processor, regularizers


def train(
    output: Path, pictures: int = 64, epochs: int = 4, batch: int = 8, resume: bool = False
) -> list[float]:
    """Train, save the adapter, and return the loss of every batch; all of it can be resumed."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    rows, names = drawings(pictures)
    model, processor, regularizers = adapted(epochs)
    objective = graftune.ClassNameClassifier(names, processor, TEMPLATE)
    regularization = graftune.Regularization(model, regularizers)
    loader = DataLoader(rows, batch, shuffle=True, collate_fn=ImageCollator(processor))
    prompts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(prompts, lr=RATE, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    regularization.start(steps=epochs * len(loader) // ACCUMULATED, epochs=epochs)
    accelerator.register_for_checkpointing(regularization)
    if resume:
        accelerator.load_state(str(output / "state"))
    rates = cosine_rates(epochs, RATE, FIRST_EPOCHS_RATE)
    losses = []
    for epoch in range(regularization.epochs_done, epochs):
        loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = rates[epoch]
        model.train()
        for inputs in loader:
            with accelerator.accumulate(model):
                outputs = regularization(objective, model, inputs)
                accelerator.backward(outputs["loss"])
                if accelerator.sync_gradients:
                    regularization.transform_gradients()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                regularization.step_end()
            losses.append(accelerator.reduce(outputs["loss"].detach(), "mean").item())
        regularization.epoch_end()
        accelerator.print(f"epoch {epoch + 1}: the last loss is {losses[-1]:.4f}")
        accelerator.save_state(str(output / "state"))
    regularization.end()
    bare = accelerator.unwrap_model(model)
    bare.save_pretrained(output / "adapter", is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_loop"))
    parser.add_argument("--pictures", type=int, default=64, help="one a class")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and batch")
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch's state")
    train(**vars(parser.parse_args()))
