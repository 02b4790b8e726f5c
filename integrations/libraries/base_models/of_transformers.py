"""Base models of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from graftune.integrations.libraries.base_models.base_model import BaseModel
from graftune.integrations.libraries.base_models.heads import name_of_head, new_outputs
from graftune.integrations.libraries.base_models.names import Source

# The automatic classes of the model and of what prepares its inputs.
_CLASSES = {
    "class_names": ("AutoModel", "AutoProcessor"),
    "image_classes": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "causal_lm": ("AutoModelForCausalLM", "AutoTokenizer"),
}


def config_of(source: Source, revision: str | None) -> Any:
    """Return a model's config."""
    return transformers.AutoConfig.from_pretrained(source.name, **_options(source, revision))


def load_transformers(
    source: Source,
    objective: str,
    revision: str | None,
    dtype: str,
    class_names: Sequence[str] | None,
    head: str | None,
) -> BaseModel:
    """Load a model by transformers' automatic classes; see `load_base_model`."""
    model_cls, processor_cls = (getattr(transformers, name) for name in _CLASSES[objective])
    options = _options(source, revision)
    processor = processor_cls.from_pretrained(source.name, **options)
    outputs, is_new = tuple(class_names or ()), False
    if objective == "image_classes" and class_names is not None:
        known, count = _outputs_of(config_of(source, revision))
        is_new = new_outputs(source.name, class_names, known, count, head)
        if is_new:
            options |= {
                "id2label": dict(enumerate(class_names)),
                "label2id": {name: index for index, name in enumerate(class_names)},
                "ignore_mismatched_sizes": True,
            }
        elif known:
            outputs = tuple(known)
    weights = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _no_report() if is_new else nullcontext():
        model = model_cls.from_pretrained(source.name, dtype=weights, **options)
    if source.part:
        model = _unpacked(model, source)
    return BaseModel(
        model.eval(),
        objective,
        tokenizer=None if objective == "image_classes" else processor,
        transform=None if objective == "causal_lm" else processor,
        outputs=outputs,
        new_head=name_of_head(model) if is_new else None,
    )


def _unpacked(model: Any, source: Source) -> Any:
    """Return a model that was read from a GGUF file as one that can be trained and saved.

    Its weights are whole numbers no more, but transformers goes on to treat it as quantised.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = str(Path(source.name, str(source.part)))
    whole = type(model)(config)
    whole.load_state_dict(model.state_dict(), assign=True)
    whole.tie_weights()
    return whole


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from listing what a new head, as was asked for, leaves out."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _options(source: Source, revision: str | None) -> dict[str, Any]:
    gguf = {"gguf_file": source.part} if source.part else {}
    return {"revision": revision, **gguf}


def _outputs_of(config: Any) -> tuple[list[str], int]:
    """Return the names of a model's classes, empty where they have none, and their number."""
    # Every config has labels; the model has outputs for them if it was saved with a head.
    if not str((config.architectures or [""])[0]).endswith("ForImageClassification"):
        return [], 0
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    has_names = names != [f"LABEL_{index}" for index in range(len(names))]
    return names if has_names else [], len(names)
