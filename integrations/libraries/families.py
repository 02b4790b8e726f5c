"""Recognising a model: which library it comes from, and which of its layers are worth adapting.

Recognition reads class names only, so that no library is imported for the sake of asking. What to
adapt by default follows from structure rather than from lists of architectures: the linear,
attention and convolution layers inside a model's repeated blocks. Embeddings, heads, projections
and stems lie outside the blocks and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.modules import base_modules

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = (nn.MultiheadAttention,)

_LIBRARIES = ("open_clip", "timm", "diffusers", "transformers")

# Heads of transformers' models, by the end of the class name, and PEFT's task types for them.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Family:
    """What is known of a model from looking at it.

    Args:
        library: "transformers", "open_clip", "timm", "diffusers" or "torch" for any other module.
        architecture: the model type or class name, for messages.
        task_type: PEFT's task type for the model's head, or None.
    """

    library: str
    architecture: str
    task_type: str | None = None


def recognise(model: nn.Module) -> Family:
    """Return the family that a model belongs to.

    Example:
        >>> recognise(nn.Sequential(nn.Linear(2, 2)))
        Family(library='torch', architecture='Sequential', task_type=None)
    """
    name = type(model).__name__
    # A user's own subclass of a library's model belongs to the library.
    origins = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    library = next((library for library in _LIBRARIES if library in origins), "torch")
    if library != "transformers":
        return Family(library, name)
    architecture = getattr(getattr(model, "config", None), "model_type", None) or name
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    task_type = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task_type == "SEQ_2_SEQ_LM" and not encoder_decoder:
        task_type = None  # a vision-language model, which PEFT has no task type for
    return Family(library, architecture, task_type)


def default_targets(model: nn.Module) -> list[str]:
    """Return `target_modules` for the layers of the model's repeated blocks, sorted.

    These are linear layers, whole `nn.MultiheadAttention`s and convolutions that are not depthwise
    (a low-rank adapter of a depthwise layer is larger than the layer). A model without repeated
    blocks is taken as one block. Names are shortened to what follows the block's number where that
    means the same layers.

    Example:
        >>> block = lambda: nn.ModuleDict({"up": nn.Linear(2, 4), "down": nn.Linear(4, 2)})
        >>> default_targets(nn.ModuleList([block(), block()]))
        ['down', 'up']
    """
    every = dict(base_modules(model))
    layers = {key: module for key, module in every.items() if _is_candidate(module)}
    attentions = [key for key, module in layers.items() if isinstance(module, ATTENTION)]
    names = [
        key
        for key in layers
        # The projections inside an nn.MultiheadAttention are adapted with it.
        if not any(key.startswith(f"{attention}.") for attention in attentions)
    ]
    in_blocks = [key for key in names if block_number(key) is not None]
    return shorten(in_blocks or names, list(every))


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 or module.in_channels > module.groups
    return isinstance(module, LINEAR + ATTENTION)


def block_number(key: str) -> int | None:
    """Return the position of the last number in a dotted name that is not the name's end.

    Example:
        >>> block_number("encoder.layers.11.mlp.fc1")
        2
    """
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return numbers[-1] if numbers else None


def shorten(names: list[str], every: list[str]) -> list[str]:
    """Return the shortest endings, from a block's number on, that match `names` and no others.

    Args:
        names: names of modules.
        every: the names of all modules of the model.

    Example:
        >>> shorten(["0.up", "1.up"], ["0", "0.up", "0.down", "1", "1.up", "1.down"])
        ['up']
    """
    others = set(every) - set(names)
    endings = {".".join(key.split(".")[i:]) for key in others for i in range(key.count(".") + 1)}
    chosen = set()
    for name in names:
        parts = name.split(".")
        number = block_number(name)
        first = 0 if number is None else number + 1
        suffixes = (".".join(parts[i:]) for i in range(first, -1, -1))
        chosen.add(next(suffix for suffix in suffixes if suffix not in endings))
    return sorted(chosen)
