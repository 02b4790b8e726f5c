"""Teach a diffusion model a style, by several methods, and see what it still draws as before.

    accelerate launch examples/diffusion_style.py
    python examples/diffusion_style.py --methods sara --prior 60
    accelerate launch examples/diffusion_style.py --data my-style --template "{} in sks style" \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --parameters 50000000

Without options the embedded UNet, which draws emoji in one style, learns another by texts such as
"line art of tiger" (`embedded/styles.py`), with SaRA, FLoRA and LoRA at equal numbers of trained
parameters, and by fine-tuning all of them. With `--model`, a Stable Diffusion pipeline learns the
style of the pictures in `--data`: a folder, or a data set on the Hub, with the columns "image" and
"text", where texts say what is in a picture and nothing of the style; `--template` adds that. SaRA
then has the settings of its paper (arXiv 2409.06633): AdamW with weight decay 1e-2, a cosine, the
learning rate 1e-3 · exp(−350 t) for the threshold t, the UNet alone.

Writes for each method the adapter and a grid of pictures of the same noise: real ones, the base
model's and the method's by texts with the style, and both models' by texts without. The table has,
for texts with the style, distances to its pictures (FID, KID), how well what is drawn fits its
texts (CLIP), and both in one number among the methods compared (VLHI). For texts without the style,
of other emoji, it has how much is kept: agreement with what the base model draws, and FID to that.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import HfArgumentParser, TrainingArguments, set_seed

import graftune
from embedded.diffusion import grid, load_pipeline
from embedded.model import load_clip
from embedded.results import console, environment, table
from embedded.styles import TEMPLATE, TRAINED, style_task, training_rows
from graftune.adapters.flora.functional import resolve_ranks
from graftune.integrations.generation import (
    ClipImageFeatures,
    clip_score,
    image_distances,
    picture_agreement,
    visual_linguistic_harmony,
)

Images = list[Image.Image]

METHODS = ("sara", "flora", "lora", "full")
EMBEDDED_RATES = {"sara": 5e-3, "flora": 5e-3, "lora": 5e-3, "full": 1e-3}
RATES = {"flora": 1e-4, "lora": 1e-4, "full": 1e-5}  # SaRA's follows from its threshold
COLUMNS = {
    "trained": ",.0f",
    "FID": ".1f",
    "KID": ".1f",
    "CLIP": ".1f",
    "VLHI": ".2f",
    "old kept": ".1f",
    "old FID": ".1f",
    "seconds": ".0f",
}
SHOWN = 12  # pictures a row of a grid


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What to compare, on what."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Which of {', '.join(METHODS)}."}
    )
    model: str | None = option(None, "A Stable Diffusion pipeline: Hub id or folder.")
    data: str | None = option(None, "Pictures with texts: a folder, or a data set on the Hub.")
    template: str = option(TEMPLATE, "The text of a picture in the new style; {} is its own text.")
    clip: str | None = option(None, "The CLIP that measures: Hub id or folder.")
    parameters: int = option(500_000, "Trained parameters of all methods but `full`.")
    rates: list[str] = field(
        default_factory=list, metadata={"help": "Other learning rates, such as sara=1e-3."}
    )
    prior: int = option(0, "Pictures of the base model, without the style, to train on as well.")
    prior_weight: float = option(1.0, "Weight of the loss on these (prior preservation).")
    pictures: int = option(TRAINED, "How many emoji to train on.")
    split: str = option("test", "Which emoji shall stay: test, or validation to choose settings.")
    sampling_steps: int = option(12, "Steps of drawing.")
    guidance: float = option(1.0, "How far to go beyond the prediction without a text.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with SaRA's settings as defaults."""

    output_dir: str = "outputs/diffusion_style"
    seed: int = 0
    max_steps: int = 200
    per_device_train_batch_size: int = 16
    weight_decay: float = 1e-2
    lr_scheduler_type: str = "cosine"
    logging_strategy: str = "no"
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


@dataclass
class Work:
    """What is taught to what, and how it is drawn and measured.

    Args:
        pipeline: with a UNet, and the scheduler it was trained with.
        draw: draws texts with the pipeline as it is, the same place always from the same noise.
        rows: of training: "sample" and "encoder_hidden_states", and "prior" where it matters.
        asked: what is in the pictures of the style.
        real: these pictures.
        template: makes these texts ones with the style.
        plain: texts without the style, which shall be drawn as before.
        features: of the CLIP that measures.
    """

    pipeline: Any
    draw: Callable[[Sequence[str]], Images]
    rows: list[dict[str, Tensor]]
    asked: list[str]
    real: Images
    template: str
    plain: list[str]
    features: ClipImageFeatures

    def drawn(self) -> tuple[Images, Images]:
        """Draw texts with the style, and without."""
        self.pipeline.unet.eval()
        return self.draw([self.template.format(text) for text in self.asked]), self.draw(self.plain)


def embedded_work(options: Options, seed: int) -> Work:
    """The embedded UNet and emoji in a style it has never seen."""
    pipeline, task = load_pipeline(), style_task(seed, options.pictures)

    def draw(texts: Sequence[str]) -> Images:
        return pipeline(texts, steps=options.sampling_steps, guidance=options.guidance)

    def encode(images: Images, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        return training_rows(pipeline, images, list(texts))

    plain = getattr(task, options.split).names
    shown = (task.train.names, task.train.images, options.template, plain)
    work = Work(pipeline, draw, [], *shown, measuring(options))
    work.rows = rows_of(options, work, encode)
    return work


def own_work(options: Options, device: torch.device) -> Work:
    """A Stable Diffusion pipeline and one's own pictures."""
    from datasets import load_dataset
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(options.model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    own = ("imagefolder", None, options.data) if Path(options.data).is_dir() else (options.data,)
    data = load_dataset(*own, split="train")
    images = [image.convert("RGB") for image in data["image"]]
    texts = list(data["text"])

    def draw(texts: Sequence[str]) -> Images:
        drawn: Images = []
        for seed, text in enumerate(texts):
            noise = torch.Generator("cpu").manual_seed(seed)
            steps, guidance = options.sampling_steps, options.guidance
            drawn += pipeline(
                text, num_inference_steps=steps, guidance_scale=guidance, generator=noise
            ).images
        return drawn

    def encode(images: Images, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        return latent_rows(pipeline, images, texts)

    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    real = [ImageOps.fit(image, (side, side)) for image in images]
    work = Work(pipeline, draw, [], texts, real, options.template, texts, measuring(options))
    work.rows = rows_of(options, work, encode)
    return work


@torch.no_grad()
def latent_rows(pipeline: Any, images: Images, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return pictures as latents with their texts' states, one row in ten with the empty text."""
    rows = []
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        pixels = pipeline.image_processor.preprocess(image)
        latent = pipeline.vae.encode(pixels.to(pipeline.device)).latent_dist.mode()[0]
        told = text if place % 10 else ""
        states = pipeline.encode_prompt(told, pipeline.device, 1, False)[0][0]
        scaled = pipeline.vae.config.scaling_factor * latent
        rows.append({"sample": scaled.cpu(), "encoder_hidden_states": states.cpu()})
    return rows


def rows_of(
    options: Options,
    work: Work,
    encode: Callable[[Images, Sequence[str]], list[dict[str, Tensor]]],
) -> list[dict[str, Tensor]]:
    """Return the rows of training, those of prior preservation among them."""
    rows = encode(work.real, [options.template.format(text) for text in work.asked])
    if not options.prior:
        return rows
    plain = [work.asked[place % len(work.asked)] for place in range(options.prior)]
    own = encode(work.draw(plain), plain)
    yes, no = torch.tensor(True), torch.tensor(False)
    return [*({**row, "prior": no} for row in rows), *({**row, "prior": yes} for row in own)]


def measuring(options: Options) -> ClipImageFeatures:
    """Return the CLIP that measures."""
    if options.clip is None:
        return ClipImageFeatures(*load_clip())
    model = transformers.CLIPModel.from_pretrained(options.clip).eval()
    return ClipImageFeatures(model, transformers.CLIPProcessor.from_pretrained(options.clip))


def layers(unet: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all linear layers and convolutions, by the names of their modules."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: m.weight for name, m in unet.named_modules() if isinstance(m, kinds)}


def low_rank(unet: nn.Module, method: str, parameters: int) -> int:
    """Return the rank at which FLoRA or LoRA trains closest to so many parameters."""

    def count(rank: int) -> int:
        total = 0
        for weight in layers(unet).values():
            if method == "lora":
                total += rank * (weight.shape[0] + weight[0].numel())
            else:
                ranks = resolve_ranks(rank, weight.shape)
                total += math.prod(ranks) + sum(
                    map(math.prod, zip(ranks, weight.shape, strict=True))
                )
        return total

    ranks = range(1, max(max(weight.shape) for weight in layers(unet).values()) + 1)
    return min(ranks, key=lambda rank: abs(count(rank) - parameters))


def attach(unet: nn.Module, method: str, parameters: int) -> nn.Module:
    """Return the UNet with what a method trains of it or adds to it."""
    if method == "sara":
        return graftune.wrap(unet, "sara", num_parameters=parameters)
    if method == "full":
        return unet.requires_grad_(True)
    rank, targets = low_rank(unet, method, parameters), list(layers(unet))
    if method == "flora":
        return graftune.wrap(unet, "flora", r=rank, target_modules=targets)
    return graftune.wrap(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def rate_of(method: str, model: Any, options: Options) -> float:
    """Return a method's learning rate: the one that is given, or its default."""
    given = dict(rate.split("=") for rate in options.rates)
    if method in given:
        return float(given[method])
    if options.model is None:
        return EMBEDDED_RATES[method]
    if method == "sara":
        return 1e-3 * math.exp(-350 * model.active_peft_config.cutoff)
    return RATES[method]


def measured(work: Work, drawn: tuple[Images, Images], before: tuple[Images, Images]) -> dict:
    """Return how well a model draws the new style, and what it kept of the old."""
    distances = image_distances(drawn[0], work.real, work.features)
    return {
        "FID": distances["fid"],
        "KID": distances["kid"],
        "CLIP": clip_score(drawn[0], work.asked, work.features),
        "old kept": picture_agreement(drawn[1], before[1], work.features),
        "old FID": image_distances(drawn[1], before[1], work.features)["fid"],
    }


def fine_tune(work: Work, model: nn.Module, args: TrainingArguments, prior_weight: float) -> Any:
    """Train a model on the rows of some work; return the trainer."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(work.pipeline.scheduler.config)
    trainer = graftune.Trainer(
        model,
        args,
        objective=graftune.Denoising(scheduler, prior_weight=prior_weight),
        train_dataset=work.rows,
        data_collator=default_collate,
    )
    trainer.train()
    return trainer


def write(folder: Path, model: nn.Module, work: Work, rows: Sequence[Images]) -> None:
    """Save what was trained, and the grid."""
    model.save_pretrained(folder)
    columns = min(SHOWN, len(work.asked), len(work.plain))
    grid([image for row in rows for image in row[:columns]], columns).save(folder / "grid.png")


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if (options.model is None) != (options.data is None):
        raise SystemExit("--model and --data belong together: give both, or none")
    set_seed(args.seed)
    work = own_work(options, args.device) if options.model else embedded_work(options, args.seed)
    base, before = work.pipeline.unet, work.drawn()
    rows = [{"method": "base model", "trained": 0, **measured(work, before, before), "seconds": 0}]
    for method in options.methods:
        set_seed(args.seed)
        unet = copy.deepcopy(base)
        model = attach(unet, method, options.parameters)
        rate = rate_of(method, model, options)
        start = time.perf_counter()
        own = dataclasses.replace(args, learning_rate=rate)
        trainer = fine_tune(work, model, own, options.prior_weight)
        seconds = time.perf_counter() - start
        if trainer.is_world_process_zero():
            work.pipeline.register_modules(unet=unet)
            drawn = work.drawn()
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            scores = measured(work, drawn, before)
            rows.append({"method": method, "trained": trained, **scores, "seconds": seconds})
            shown = (work.real, before[0], drawn[0], before[1], drawn[1])
            write(Path(args.output_dir) / method, model, work, shown)
            work.pipeline.register_modules(unet=base)
    if trainer.is_world_process_zero():
        report(rows, Path(args.output_dir), options, args)
    trainer.end()


def report(rows: list[dict[str, Any]], folder: Path, options: Options, args: Any) -> None:
    """Add the index to the rows, write them, print the table."""
    fids, clips = ({row["method"]: row[name] for row in rows} for name in ("FID", "CLIP"))
    for name, value in visual_linguistic_harmony(fids, clips).items():
        next(row for row in rows if row["method"] == name)["VLHI"] = value
    settings = {"steps": args.max_steps, "batch": args.train_batch_size, "seed": args.seed}
    content = {
        "options": dataclasses.asdict(options) | settings,
        "environment": environment(),
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    title = f"{args.max_steps} steps of {args.train_batch_size} pictures"
    console().print(table(title, rows, ("method",), COLUMNS))
    print(f"Written to {folder}: results.json, and for each method the adapter and grid.png")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.utils.logging.disable_progress_bar()
    main()
