"""Every code block in the README and the docs runs, and every link leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from support.pages import PAGES, ROOT, RUN, SHOWN, blocks, run_page

# How many blocks of a page the tests do not run, and why.
NOT_RUN = {
    ("README.md", "it makes an environment"): 1,
    ("README.md", "it installs packages"): 1,
    ("README.md", "needs the Hub"): 1,
    ("README.md", "minutes each; their tests run them small"): 1,
    ("docs/distributed.md", "needs several GPUs"): 1,
    ("docs/hub.md", "needs the Hub"): 3,
    ("docs/quickstart.md", "it installs packages"): 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    ran, log = run_page(page, folder)
    assert ran, log


def test_what_is_not_run_is_listed_here() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for page in PAGES:
        for block in blocks(page):
            if block.reason is not None:
                found[str(page.relative_to(ROOT)), block.reason] += 1
                if block.language == "python":
                    compile(block.code, f"{page}:{block.line}", "exec")
    assert found == NOT_RUN


def test_every_fence_is_a_block_with_a_language() -> None:
    for page in PAGES:
        found = list(blocks(page))
        fences = re.findall(r"^\s*```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(found), f"{page.name} has a fence that is no block"
        for block in found:
            assert block.language in RUN + SHOWN, f"{page.name}:{block.line} {block.language!r}"


def test_relative_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
