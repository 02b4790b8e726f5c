"""Writing whole files or none: under another name first, then moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from graftune.adapters.base.messages import listing

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def write_folder(folder: str | Path, write: Callable[[Path], object]) -> tuple[Path, ...]:
    """Let `write` fill a new folder and move its files into `folder`; all of them or none.

    Args:
        folder: where the files shall be; made if need be.
        write: writes files, without subfolders, into the folder that it is given.

    Returns:
        The files in their place.

    Raises:
        FileExistsError: `folder` holds weights of another model that would stay beside the new
            ones and be loaded instead.
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    check_is_no_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that moving is renaming.
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        write(temporary)
        written = sorted(path.name for path in temporary.iterdir())
        _check_no_other_weights(folder, written)
        for name in written:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(folder / name for name in written)


def write_tensors(
    file: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Path, ...]:
    """Write one safetensors file; whole or not at all.

    Args:
        file: its path; folders are made if need be.
        tensors: by name; moved to the CPU.
        metadata: what the file's header shall say beside "format".

    Raises:
        IsADirectoryError: `file` is a folder.
        ValueError: its name does not end in `.safetensors`.
    """
    file = Path(file)
    check_is_safetensors(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=file.parent))
    try:
        save_tensors(temporary / file.name, tensors, metadata)
        os.replace(temporary / file.name, file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return (file,)


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save tensors that may share memory, be views or be on any device."""
    separate = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in separate.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            separate[name] = tensor.clone()
        seen.add(storage)
    save_file(separate, file, {"format": "pt", **metadata})


def check_is_safetensors(file: str | Path) -> None:
    """Raise unless the path can become a safetensors file."""
    if Path(file).suffix != ".safetensors":
        raise ValueError(
            f"{str(file)!r} must end in .safetensors: this writes one file of that format"
        )
    if Path(file).is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder: give the name of a file in it")


def check_is_no_file(folder: Path) -> None:
    if folder.is_file():
        raise NotADirectoryError(
            f"{str(folder)!r} is a file: give the name of a folder, which is made if need be"
        )


def _check_no_other_weights(folder: Path, written: list[str]) -> None:
    others = sorted(
        path.name for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()
    )
    left = [name for name in others if name not in written]
    if left:
        raise FileExistsError(
            f"{str(folder)!r} holds other weights ({listing(left, 3)}), which could be loaded in "
            "the place of the exported ones: choose another folder or empty it first. Nothing "
            "was written"
        )
