"""The wheel holds graftune and nothing beside it; importing it is cheap and pulls in no extra."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = ("open_clip", "timm", "diffusers", "datasets", "matplotlib", "PIL", "torchvision", "rich")


def run_python(code: str, *options: str) -> str:
    result = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout or result.stderr


@pytest.mark.slow
def test_the_wheel_installs_graftune_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("graftune-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"graftune", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"graftune/py.typed", "graftune/adapters/flora/layer.py"} <= set(names)
    assert "graftune/integrations/libraries/families.py" in names
    sources = {
        path.relative_to(ROOT / folder).as_posix()
        for folder in ("adapters", "integrations")
        for path in (ROOT / folder).rglob("*.py")
    }
    installed = {name.split("/", 2)[2] for name in names if name.count("/") > 1}
    assert sources <= installed, "a package is missing from [tool.setuptools] packages"


def test_importing_pulls_in_no_extra() -> None:
    # What peft and transformers import on their own is theirs.
    code = "import sys, json, {}; print(json.dumps(sorted(sys.modules)))"
    before = set(json.loads(run_python(code.format("peft"))))
    after = set(json.loads(run_python(code.format("graftune"))))
    added = {name.partition(".")[0] for name in after - before}
    assert not added & set(EXTRAS)
    assert "transformers.trainer" not in after - before


def test_importing_registers_the_methods_with_peft() -> None:
    code = (
        "import graftune, peft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs\n"
        "print(configs['FLORA'] is graftune.FloraConfig, peft.PeftType('FLORA').value)"
    )
    assert run_python(code).split() == ["True", "FLORA"]


def test_the_version_is_that_of_the_package() -> None:
    code = (
        "import graftune, importlib.metadata as m; "
        "print(graftune.__version__ == m.version('graftune'))"
    )
    assert run_python(code).strip() == "True"
