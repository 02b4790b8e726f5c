"""Pretrain the embedded UNet: emoji of two categories, in one drawing style, from their names.

    python examples/pretraining/pretrain_unet.py --state /tmp/unet

A killed run continues from its last saved state. The loss is `graftune.Denoising` of the velocity;
one text in ten is empty, for guidance. Half of the pictures are moved a little, so that their
number grows, and fewer as the learning rate falls. Timesteps in the middle come more often: at the
first ones the loss is high and says little of what is drawn.
The weights that are written are a moving average of those that are trained.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from augment import move
from diffusers import DDPMScheduler, UNet2DConditionModel
from long_run import move_average, rate_at, save_state, saved_state, use_allowed_cores
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run as files, not modules

import graftune
from embedded.diffusion import BLOCK, UNET, drawn, encode_texts
from embedded.model import CLIP


def new_unet() -> UNet2DConditionModel:
    """A randomly initialised UNet of 5.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        block_out_channels=(64, 96, 144),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Run:
    """Everything that changes during training, so that it can be saved and continued."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(0)
        self.unet = new_unet().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        self.objective = graftune.Denoising(self.scheduler)
        images, names = drawn()
        self.ink = 1 - torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        text_encoder = CLIPTextModel.from_pretrained(CLIP, dtype=torch.float32).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(CLIP)
        self.texts = encode_texts(text_encoder, tokenizer, [*names, ""])  # the last is of no text
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = 0

    def batch(self) -> dict[str, Tensor]:
        """A random batch of pictures, some of them moved, with their texts."""
        count = self.args.batch
        rows = torch.randint(len(self.ink), (count,))
        ink = self.ink[rows]
        moved = torch.rand(count, 1, 1, 1) < 0.5 * rate_at(self.step, self.args.steps)
        pixels = 1 - 2 * torch.where(moved, move(ink), ink)
        told = torch.where(torch.rand(count) < 0.1, len(self.ink), rows)
        samples = F.pixel_unshuffle(pixels, BLOCK).to(memory_format=torch.channels_last)
        shares = (0.4 + 1.2 * torch.randn(count)).sigmoid()
        return {
            "sample": samples,
            "encoder_hidden_states": self.texts[told],
            "timesteps": (self.scheduler.config.num_train_timesteps * shares).long(),
        }

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate_at(self.step, self.args.steps)
        loss = self.objective(self.unet, **self.batch())["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        move_average(self.average, self.unet, self.step, 500)
        return loss.item()

    def save(self) -> None:
        """Write the state."""
        state = {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        save_state(self.args.state, state)

    def resume(self) -> None:
        """Continue from the saved state, if there is one."""
        state = saved_state(self.args.state)
        if state is None:
            return
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def write(self, folder: Path) -> None:
        """Write the averaged weights in half precision, and the scheduler."""
        copy.deepcopy(self.average).half().save_pretrained(folder)
        self.scheduler.save_pretrained(folder)


def main() -> None:
    """Train, and write the averaged weights now and then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, default=UNET)
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()

    run = Run(args)
    run.resume()
    count = sum(p.numel() for p in run.unet.parameters())
    print(f"{count:,} parameters, {len(run.ink)} pictures", flush=True)
    start, first, total = time.monotonic(), run.step, 0.0
    while run.step < args.steps:
        use_allowed_cores()
        total += run.train_step()
        if run.step % 50 == 0:
            speed = (run.step - first) * args.batch / (time.monotonic() - start)
            print(f"step {run.step} loss {total / 50:.4f}, {speed:.0f} pictures/s", flush=True)
            total = 0.0
        if run.step % args.save_every == 0:
            run.save()
            run.write(args.out)
    run.save()
    run.write(args.out)


if __name__ == "__main__":
    main()
