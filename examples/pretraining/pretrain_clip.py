"""Pretrain the embedded CLIP on emoji in ten drawing styles.

    python examples/pretraining/pretrain_clip.py --state /tmp/clip

A killed run continues from its last saved state. Losses: every picture against the names of all
emoji (those not in the batch from a memory of their last features) and against one free vector per
emoji, names against the same vectors and against the pictures of the batch, pictures of one emoji
in two styles against each other, and pictures against subcategories.

On Linux the environment `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296
MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive` about doubles the speed on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import augment, plain
from captions import name_caption, subcategory_caption
from long_run import move_average, rate_at, save_state, saved_state, use_allowed_cores
from muon import Muon
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from embedded.pictures import FAR, NEAR, SEEN, all_emoji, load_style

FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "clip"


def new_model(processor: CLIPProcessor) -> CLIPModel:
    """A randomly initialised CLIP of about 3.7 M parameters."""
    tokenizer = processor.tokenizer
    shared = {"hidden_act": "gelu_pytorch_tanh", "projection_dim": 128}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": 48,
        "patch_size": 12,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
    }
    config = CLIPConfig(
        text_config={**text, **shared},
        vision_config={**vision, **shared},
        projection_dim=128,
        logit_scale_init_value=2.6592,
    )
    return CLIPModel(config)


@dataclass
class Pictures:
    """All training pictures in memory, and which of them show an emoji."""

    images: Tensor  # (N, 3, 48, 48) uint8
    of_emoji: list[list[int]]

    @classmethod
    def load(cls) -> Pictures:
        """Read every seen style."""
        of_emoji: list[list[int]] = [[] for _ in all_emoji()]
        sheets, offset = [], 0
        for name in SEEN:
            style = load_style(name)
            sheets.append(torch.from_numpy(style.images).permute(0, 3, 1, 2))
            for row, emoji in enumerate(style.emoji):
                of_emoji[emoji.index].append(offset + row)
            offset += len(style)
        return cls(torch.cat(sheets).contiguous(), of_emoji)

    def pair(self, emoji: list[int], rng: random.Random) -> Tensor:
        """Two pictures in different styles for each emoji: all first ones, then all second."""
        pairs = [rng.sample(self.of_emoji[e], 2) for e in emoji]
        return self.images[torch.tensor([p[0] for p in pairs] + [p[1] for p in pairs])]


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit image features."""
    return F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)


def text_features(model: CLIPModel, processor: CLIPProcessor, texts: list[str]) -> Tensor:
    """Unit text features. Padding needs no mask: attention is causal and the end is pooled."""
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


class Run:
    """Everything that changes during training, so that it can be saved and continued."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(0)
        self.rng = random.Random(0)
        self.parts: list[Tensor] = []
        self.processor = CLIPProcessor.from_pretrained(FOLDER)
        self.model = new_model(self.processor)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.emoji = all_emoji()
        self.subcategories = sorted({e.subcategory for e in self.emoji})
        place = {name: i for i, name in enumerate(self.subcategories)}
        self.subcategory_of = torch.tensor([place[e.subcategory] for e in self.emoji])
        self.pictures = Pictures.load()
        self.memory = F.normalize(torch.randn(len(self.emoji), 128), dim=-1)
        # One free vector an emoji, thrown away at the end: it tells the vision tower what belongs
        # together before the text tower can, and gives the text tower something to aim at.
        self.prototypes = torch.nn.Parameter(F.normalize(torch.randn(len(self.emoji), 128), dim=-1))
        self.order: list[int] = []
        self.step = 0
        matrices = [p for n, p in self.model.named_parameters() if ".layers." in n and p.ndim == 2]
        inside = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        decayed = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.05}
        free = {"params": [p for p in rest if p.ndim < 2] + [self.prototypes], "weight_decay": 0.0}
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=args.lr),
            torch.optim.AdamW([decayed, free], lr=args.lr / 4, betas=(0.9, 0.98), fused=True),
        ]

    def next_emoji(self) -> list[int]:
        """The next emoji of an endless shuffled sequence, none twice in a batch."""
        count = self.args.batch // 2
        if len(self.order) < count:
            self.order = self.rng.sample(range(len(self.emoji)), len(self.emoji))
        batch, self.order = self.order[:count], self.order[count:]
        return batch

    def loss(self, progress: float) -> Tensor:
        """The training loss of one random batch."""
        chosen = self.next_emoji()
        rows = torch.tensor(chosen)
        # Easy pictures first: otherwise hundreds of steps pass before anything is told apart.
        share = 0.65 * min(1.0, progress / 0.4)
        pixels = augment(self.pictures.pair(chosen, self.rng), share)
        images = image_features(self.model, pixels)
        captions = [name_caption(self.emoji[e], self.rng) for e in chosen]
        captions += [subcategory_caption(kind, self.rng) for kind in self.subcategories]
        texts = text_features(self.model, self.processor, captions)
        names, kinds = texts[: len(chosen)], texts[len(chosen) :]

        scale = self.model.logit_scale.exp().clamp(max=100)
        own, target = torch.arange(len(chosen)), torch.cat([rows, rows])
        every_name = self.memory.index_copy(0, rows, names)
        self.memory = every_name.detach()
        if progress < 0.4:
            # Remembered features are too stale while the text tower moves fast.
            by_name = F.cross_entropy(scale * images @ names.T, torch.cat([own, own]))
        else:
            by_name = F.cross_entropy(scale * images @ every_name.T, target)
        prototypes = 16 * F.normalize(self.prototypes, dim=-1)
        by_prototype = F.cross_entropy(images @ prototypes.T, target)
        name_prototype = F.cross_entropy(names @ prototypes.T, rows)

        log_p = (scale * names @ images.T).log_softmax(1)
        by_image = -(log_p[own, own] + log_p[own, own + len(chosen)]).mean() / 2

        alike = (images @ images.T / 0.1).fill_diagonal_(-1e4)
        between_styles = F.cross_entropy(alike, torch.cat([own + len(chosen), own]))

        by_kind = F.cross_entropy(scale * images @ kinds.T, self.subcategory_of[target])
        self.parts = [by_name, by_prototype, name_prototype, by_image, between_styles, by_kind]
        weights = (1, 1, 0.5, 0.3, 0.3, 0.6)
        return sum(w * part for w, part in zip(weights, self.parts, strict=True))

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        rate = rate_at(self.step, self.args.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("full_lr", group["lr"]) * rate
        loss = self.loss(self.step / self.args.steps)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        move_average(self.average, self.model, self.step, 400)
        return loss.item()

    @torch.no_grad()
    def quick_check(self, model: CLIPModel, count: int = 250) -> str:
        """Name accuracy (top-1, top-5, in %) on some pictures of every style."""
        names = [f"a picture of {e.name}" for e in self.emoji]
        texts = text_features(model, self.processor, names)
        shown = []
        for name in (*SEEN, NEAR, FAR):
            style = load_style(name)
            rows = torch.randperm(len(style), generator=torch.Generator().manual_seed(1))[:count]
            pixels = plain(torch.from_numpy(style.images)[rows].permute(0, 3, 1, 2))
            best = (image_features(model, pixels) @ texts.T).topk(5).indices
            right = best == torch.tensor([e.index for e in style.emoji])[rows, None]
            first, five = 100 * right[:, 0].float().mean(), 100 * right.any(1).float().mean()
            shown.append(f"{name} {first:.0f}/{five:.0f}")
        return ", ".join(shown)

    def save(self) -> None:
        """Write the state."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "memory": self.memory,
            "prototypes": self.prototypes.detach(),
            "step": self.step,
            "order": self.order,
            "python": self.rng.getstate(),
        }
        save_state(self.args.state, state)

    def resume(self) -> None:
        """Continue from the saved state, if there is one."""
        state = saved_state(self.args.state)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.memory, self.step, self.order = state["memory"], state["step"], state["order"]
        self.prototypes.data.copy_(state["prototypes"])
        version, internal, gauss = state["python"]
        self.rng.setstate((version, tuple(internal), gauss))


def write_model(model: CLIPModel, folder: Path) -> None:
    """Write the weights in half precision beside the processor."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    # transformers loads in the precision that the config names, and float32 is what a CPU computes
    # and adapters are trained in.
    half.config.dtype = torch.float32
    half.config.save_pretrained(folder)


def main() -> None:
    """Train, check now and then, and write the averaged weights at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=1020)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--save-every", type=int, default=150)
    parser.add_argument("--check-every", type=int, default=600)
    args = parser.parse_args()

    run = Run(args)
    run.resume()
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    start, first, total = time.monotonic(), run.step, 0.0
    while run.step < args.steps:
        use_allowed_cores()
        total += run.train_step()
        if run.step % 25 == 0:
            speed = (run.step - first) * args.batch / (time.monotonic() - start)
            scale = run.model.logit_scale.exp().item()
            parts = " ".join(f"{part.item():.2f}" for part in run.parts)
            print(
                f"step {run.step} loss {total / 25:.3f} ({parts}) scale {scale:.1f}"
                f" {speed:.0f} pictures/s",
                flush=True,
            )
            total = 0.0
        if run.step % args.save_every == 0:
            run.save()
        if run.step % args.check_every == 0:
            print(f"step {run.step}: {run.quick_check(run.average)}", flush=True)
    run.save()
    write_model(run.average, args.out)
    print(f"done: {run.quick_check(run.average)}", flush=True)


if __name__ == "__main__":
    main()
