"""Every Python block in the README and the docs runs, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[1], id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in BLOCK.finditer(page.read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, tmp_path: Path) -> None:
    # The blocks name the embedded model by its path in the repository.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # Python takes the last filter that matches. PEFT asks transformers for a name of old.
    old_name = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    filters = ["-W", "error::FutureWarning", "-W", old_name]
    subprocess.run([sys.executable, *filters, "-c", block], cwd=tmp_path, check=True)


def test_relative_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
