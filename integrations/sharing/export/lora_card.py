"""The model card of an exported LoRA."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from graftune.integrations.libraries.families import recognise


def lora_card(base: nn.Module, config: LoraConfig, method: str, layout: str = "peft") -> str:
    """Return the README.md of an exported LoRA: what it is and the lines that load it.

    Args:
        base: the base model.
        config: of the LoRA.
        method: of the adapter that it was made from, such as "FLORA".
        layout: of its file, "peft" or "diffusers".
    """
    name = config.base_model_name_or_path
    library = "PEFT" if layout == "peft" else "diffusers"
    header = ["---", f"library_name: {library.lower()}", "tags:", "- lora"]
    if name:
        header.insert(1, f"base_model: {name}")
    lines = _DIFFUSERS if recognise(base).library == "diffusers" else _PEFT
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# LoRA for {name or type(base).__name__}",
            "",
            f"Made from an adapter of the method {method}. It loads with {library} alone:",
            "",
            "```python",
            *(_PIPELINE if layout == "diffusers" else lines),
            "```",
            "",
        ]
    )


_PEFT = (
    "from peft import PeftModel",
    "",
    'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
)

_DIFFUSERS = (
    "# of a pipeline, `model` is for example `pipeline.unet`",
    "model.load_lora_adapter(",
    '    "path/to/this/folder",',
    '    weight_name="adapter_model.safetensors",',
    '    prefix="base_model.model",',
    ")",
)

_PIPELINE = ('pipeline.load_lora_weights("path/to/this/folder")',)
