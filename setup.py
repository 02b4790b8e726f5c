"""Which packages there are; everything else about the project is in pyproject.toml.

`adapters` and `integrations` are other projects' names on PyPI: these folders are installed as
subpackages of graftune and as nothing else.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "graftune": "graftune",
    "graftune.adapters": "adapters",
    "graftune.integrations": "integrations",
}

setup(
    package_dir=FOLDERS,
    # A set: `make check` links the two folders into the first.
    packages=sorted(
        {
            name
            for package, folder in FOLDERS.items()
            for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
        }
    ),
)
