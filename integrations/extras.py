"""Packages that come with an extra of graftune."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str = "train") -> Any:
    """Import a module that comes with an extra.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module.partition('.')[0]!r}, which is not installed: "
            f"pip install 'graftune[{extra}]'"
        ) from error
