"""What prompts leave of the texts that tell classes apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from graftune.adapters.prompts.deep import DeepPromptLayer


def check_names_are_left(model: nn.Module, ids: Tensor, class_names: Sequence[str]) -> None:
    """Check that prompts do not take the places of the class names.

    They take those of a text's first words: with more prompts than a template has words before the
    name, classes would be one and the same text.

    Args:
        model: the model as it is, adapted or not.
        ids: token ids of every class in every template, template by template, (T·C, L).
        class_names: C names.

    Raises:
        ValueError: two classes differ in nothing but tokens that prompts replace.
    """
    stop = _end_of_prompts(model)
    for of_one_template in ids.split(len(class_names)) if stop else ():
        seen: dict[tuple[int, ...], str] = {}
        for name, row in zip(class_names, of_one_template[:, stop:].tolist(), strict=True):
            other = seen.setdefault(tuple(row), name)
            if other != name:
                raise ValueError(
                    f"the prompts take the first {stop} places of a text, and with them what "
                    f"tells {other!r} from {name!r}: begin the template with a word for each "
                    "prompt, as in 'a photo of a {}.', or use fewer prompts"
                )


def _end_of_prompts(model: nn.Module) -> int:
    """The first position of a text behind its prompts; 0 without prompts."""
    for module in model.modules():
        if isinstance(module, DeepPromptLayer) and module.start is not None:
            tokens = module.tokens()
            if tokens is not None and tokens.ndim == 3:  # flattened in parts, under FSDP 1
                return module.start + tokens.shape[1]
    return 0
