"""Memory that layers use again: one for each thread, and never read after its time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import graftune
from graftune.adapters.sara.workspace import held, workspace

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_same_memory_grows_to_the_largest() -> None:
    first = workspace((4, 4), dtype=torch.float64, device=CPU)
    again = workspace((2, 3), dtype=torch.bfloat16, device=CPU)
    assert first.data_ptr() == again.data_ptr()
    assert (again.shape, again.dtype) == ((2, 3), torch.bfloat16)
    before = held()
    workspace((before + 1,), dtype=torch.float32, device=CPU)
    assert held() == 4 * (before + 1)


def test_made_in_inference_mode_it_serves_training() -> None:
    def both() -> torch.Tensor:
        with torch.inference_mode():
            workspace((3,), dtype=torch.float32, device=CPU).fill_(1)
        with torch.no_grad():
            return workspace((3,), dtype=torch.float32, device=CPU).fill_(2)

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(both).result().is_inference()


def test_what_autograd_may_keep_is_fresh() -> None:
    first = workspace((3,), dtype=torch.float32, device=CPU)
    again = workspace((3,), dtype=torch.float32, device=CPU)
    assert first.data_ptr() != again.data_ptr()


def test_threads_do_not_share() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.Conv1d(4, 4, 3))
    model = graftune.wrap(base, "sara", fraction=0.3, init_weights=False, regularizers=[])
    inputs = [torch.randn(4, 96) for _ in range(8)]
    alone = [model(x).detach() for x in inputs]

    def many(x: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            output = model(x)
            output.sum().backward()
        return output.detach()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(many, inputs))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
