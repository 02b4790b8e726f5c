"""Real processes that do not import everything anew: forked from one that has."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PRELOADED = [
    "torch",
    "transformers.trainer",
    "peft",
    "accelerate",
    "graftune.integrations.training",
]


def launch(function: Callable[..., None], *args: Any, processes: int = 1) -> list[int]:
    """Call a function in processes of their own, as torchrun does, and return their exit codes.

    When one of them fails or is killed, the others are. A negative code is the signal's number.

    Args:
        function: of a module that can be imported, called with `args`.
        *args: what can be pickled.
        processes: with more than one they find each other by the environment, as under torchrun.
    """
    return _launch(function, args, processes, errors=None)


def succeed(function: Callable[..., None], *args: Any, processes: int = 1) -> None:
    """Call a function in processes of their own, all of which have to succeed."""
    with TemporaryDirectory() as folder:
        codes = _launch(function, args, processes, errors=Path(folder))
        found = [path.read_text() for path in sorted(Path(folder).iterdir())]
    assert codes == [0] * processes, "\n".join([str(codes), *found])


def _launch(
    function: Callable[..., None], args: Any, processes: int, errors: Path | None
) -> list[int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    started = [
        context.Process(target=_run, args=(rank, processes, port, errors, function, args))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    while any(process.is_alive() for process in started):
        if any(process.exitcode for process in started):
            for process in started:
                process.kill()
        time.sleep(0.02)
    codes = [process.exitcode for process in started]
    for process in started:
        process.close()
    return [code if code is not None else -1 for code in codes]


def _run(
    rank: int,
    processes: int,
    port: int,
    errors: Path | None,
    function: Callable[..., None],
    args: Any,
) -> None:
    import torch

    gc.freeze()  # what was preloaded is no garbage, and takes long to search
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    try:
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        if errors is not None:
            (errors / str(rank)).write_text(f"process {rank}: {traceback.format_exc()}")
        # Not through the interpreter's end, which waits for the other processes.
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
