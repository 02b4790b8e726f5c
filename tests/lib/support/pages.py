"""Pages of the documentation: their code blocks, run in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Read and not run: what a command prints, and what is to be changed in a user's own file.
SHOWN = ("diff", "json", "text")
RUN = ("python", "sh", "yaml")

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# The server imports once what most pages import; the process of each page is a fork of it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "diffusers",
        "graftune.integrations.data",
        "graftune.integrations.objectives",
        "graftune.integrations.training",
        "open_clip",
        "timm",
        "transformers.models.auto.modeling_auto",
        "transformers.models.clip",
    ]
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Args:
        language: what stands behind the fence.
        line: number of the first line of code on the page.
        code: the lines.
        reason: why it is not run, from a comment before the fence; None where it is.
    """

    language: str
    line: int
    code: str
    reason: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page in their order.

    A block that cannot run has a line `<!-- not run: REASON -->` right before its fence.
    """
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        yield Block(match["language"], line, match["code"], match["reason"])


def run_page(page: Path, folder: Path) -> tuple[bool, str]:
    """Run the blocks of a page in a new process; return whether all ran, and what they printed.

    Args:
        page: Python blocks run each in a namespace of its own, shell blocks in a shell, and a YAML
            block whose first line is a comment with a file's name is written to that file.
        folder: where they run, an empty folder.
    """
    # The blocks name the embedded model by its path in the repository.
    (folder / "examples").symlink_to(ROOT / "examples")
    log = folder.with_suffix(".log")
    process = _PROCESSES.Process(target=_run_blocks, args=(page, folder, log))
    process.start()
    process.join()
    return process.exitcode == 0, log.read_text()


def _run_blocks(page: Path, folder: Path, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A reader has only what is installed, which may be in an environment below the root.
    sys.path[:] = [
        entry
        for entry in sys.path
        if Path(entry or ".").is_relative_to(sys.prefix)
        or not Path(entry or ".").is_relative_to(ROOT)
    ]
    warnings.filterwarnings("error", category=FutureWarning)
    # PEFT and TRL ask transformers for names of old.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    for block in blocks(page):
        if block.reason is None and block.language in RUN:
            place = f"{page.relative_to(ROOT)}:{block.line}"
            print(f"--- {place}", flush=True)
            _RUNNERS[block.language](block, page, place)


def _run_python(block: Block, page: Path, place: str) -> None:
    """Run a block as a script; the lines in its traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.code, page, "exec", dont_inherit=True)
    path = list(sys.path)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(code, main.__dict__)
    # What one block imports from the examples, the next has to import by itself.
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "embedded"]:
        del sys.modules[name]


def _run_shell(block: Block, page: Path, place: str) -> None:
    done = subprocess.run(["sh", "-e", "-c", block.code], check=False)
    if done.returncode:
        raise RuntimeError(f"the commands at {place} ended with exit code {done.returncode}")


def _write_file(block: Block, page: Path, place: str) -> None:
    name = re.match(r"# (\S+\.ya?ml)\n", block.code)
    if name is None:
        raise ValueError(f"the first line at {place} does not say the file's name, as # name.yaml")
    Path(name[1]).write_text(block.code)


_RUNNERS = {"python": _run_python, "sh": _run_shell, "yaml": _write_file}
