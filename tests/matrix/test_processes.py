"""Two processes train as one: gradients over gloo equal those of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from support.methods import METHODS, PAIRS
from support.models import MODELS, loss

# Models whose output is one row an input: a batch can be split between processes.
SPLITTABLE = ("transformers-vit", "open_clip-vit", "timm-convnext", "diffusers-unet", "torch-cnn")


def gradients(method: str, family: str, rank: int, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of the loss over this process's share of a batch of four."""
    case = MODELS[family]
    model = METHODS[method].wrap_trained(case.build())
    share = 4 // processes
    shared_by_all = {"text"}
    batch = {
        name: tensor if name in shared_by_all else tensor[rank * share : (rank + 1) * share]
        for name, tensor in case.batch(4).items()
    }
    # Unused parameters would make DistributedDataParallel raise in the second step.
    net = DistributedDataParallel(model) if processes > 1 else model
    for _ in range(2):
        model.zero_grad()
        loss(case.run(net, batch)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, processes: int, pairs: list[tuple[str, str]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    for method, family in pairs:
        result = gradients(method, family, rank, processes)
        torch.save(result, Path(folder, f"{method}-{family}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    pairs = [(method.name, family) for method, family in PAIRS if family in SPLITTABLE]
    mp.spawn(worker, args=(2, pairs, str(tmp_path)), nprocs=2)
    for method, family in pairs:
        expected = gradients(method, family, rank=0, processes=1)
        for rank in (0, 1):
            result = torch.load(tmp_path / f"{method}-{family}-{rank}.pt")
            assert result.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(result[name], gradient, rtol=1e-4, atol=1e-6)
