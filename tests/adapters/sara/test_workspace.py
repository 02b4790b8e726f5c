"""Memory that layers use again: one for each thread, and never read after its time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import graftune
from graftune.adapters.sara.workspace import held, workspace

CPU = torch.device("cpu")


def in_a_new_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(run)).result()


def test_the_same_memory_grows_to_the_largest() -> None:
    def run() -> None:
        first = workspace("test", (4, 4), dtype=torch.float64, device=CPU)
        again = workspace("test", (2, 3), dtype=torch.bfloat16, device=CPU)
        assert first.data_ptr() == again.data_ptr()
        assert (again.shape, again.dtype) == ((2, 3), torch.bfloat16)
        assert held() == 128
        workspace("test", (129,), dtype=torch.float32, device=CPU)
        assert held() == 4 * 129

    in_a_new_thread(run)


def test_each_use_has_its_own() -> None:
    def run() -> None:
        one = workspace("one", (4,), dtype=torch.float32, device=CPU).fill_(1)
        workspace("two", (4,), dtype=torch.float32, device=CPU).fill_(2)
        assert torch.equal(one, torch.ones(4))
        assert held() == 32

    in_a_new_thread(run)


def test_made_in_inference_mode_it_serves_training() -> None:
    def both() -> torch.Tensor:
        with torch.inference_mode():
            workspace("test", (3,), dtype=torch.float32, device=CPU).fill_(1)
        with torch.no_grad():
            return workspace("test", (3,), dtype=torch.float32, device=CPU).fill_(2)

    assert not in_a_new_thread(both).is_inference()


def test_what_autograd_may_keep_is_fresh() -> None:
    first = workspace("test", (3,), dtype=torch.float32, device=CPU)
    again = workspace("test", (3,), dtype=torch.float32, device=CPU)
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
