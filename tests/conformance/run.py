"""Run PEFT's own tests, from the sdist of the installed version, on graftune's config classes.

    python tests/conformance/run.py [--quick] [--sdist PATH] [-- pytest arguments]

PEFT's sources are unpacked below build/ and left as they are: `plugin.py` exchanges, while pytest
collects, the built-in configs in the parameters of the tests by ours (`rows.py` says which), and
`hub.py` makes tiny models under the names that the tests load. Only the sdist is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

PYTEST_INI = """[pytest]
addopts = -p no:cacheprovider -p conformance.plugin --import-mode=prepend --tb=short -q
testpaths = tests
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
filterwarnings =
    ignore
"""


def main() -> int:
    """Unpack, run, print the table; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a selection for every change")
    parser.add_argument("--sdist", type=Path, help="PEFT's sdist, packed or unpacked")
    parser.add_argument("--processes", default=str(min(os.cpu_count() or 1, 8)))
    parser.add_argument("pytest_args", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()

    version = importlib.metadata.version("peft")
    folder = ROOT / "build" / f"peft-{version}"
    unpack(folder, version, options.sdist)
    sys.path.insert(0, str(folder))
    from conformance import hub, report
    from conformance.rows import FAMILIES

    hub.build(folder / "hub")

    results = folder / "results.xml"
    collected = folder / "collected.json"
    for file in (results, collected):
        file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "CONFORMANCE_QUICK": "1" if options.quick else "0",
        "CONFORMANCE_REPORT": str(collected),
    }
    families = [name for name, family in FAMILIES.items() if family.quick or not options.quick]
    missing = [name for name in families if not (folder / "tests" / f"{name}.py").is_file()]
    if missing:
        print(f"PEFT {version} has no tests of these names any more: {', '.join(missing)}")
        return 1
    own = [] if options.pytest_args else [f"tests/{name}.py" for name in families]
    command = [sys.executable, "-m", "pytest", f"--junitxml={results}", f"-n{options.processes}"]
    command += ["--dist=worksteal", *own, *options.pytest_args]
    code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    return report.conclude(
        results, collected, quick=options.quick, whole=not options.pytest_args, code=code
    )


def unpack(folder: Path, version: str, sdist: Path | None) -> None:
    """Put PEFT's tests into a folder, from the package index unless an sdist is given."""
    if not (folder / "tests" / "__init__.py").is_file():
        _unpack_tests(folder, version, sdist)
    (folder / "pytest.ini").write_text(PYTEST_INI)
    # This folder as a package: its parent is not put on the path, for the names in it would hide
    # installed packages.
    (folder / "conformance").mkdir(exist_ok=True)
    (folder / "conformance" / "__init__.py").write_text(f"__path__ = [{str(HERE)!r}]\n")


def _unpack_tests(folder: Path, version: str, sdist: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = sdist or download(Path(temporary), version)
        if source.is_file():
            with tarfile.open(source) as archive:
                archive.extractall(temporary, filter="data")
            source = Path(temporary) / f"peft-{version}"
        if not (source / "tests").is_dir():
            raise SystemExit(f"{source} is not an sdist of PEFT {version}: it has no tests")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source / "tests", folder / "tests")
    # The tests import each other relatively, but the sdist lacks the file that makes a package.
    (folder / "tests" / "__init__.py").touch()


def download(folder: Path, version: str) -> Path:
    """Download PEFT's sdist with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=peft", f"--dest={folder}", f"peft=={version}"]
    subprocess.run(command, check=True)
    return next(folder.glob("peft-*.tar.gz"))


if __name__ == "__main__":
    sys.exit(main())
