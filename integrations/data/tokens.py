"""Token ids with labels: of texts that grow in steps, some of them to be learnt, and windows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from jinja2 import TemplateError

from graftune.integrations.objectives.labels import IGNORED

Step = tuple[str, bool]  # the text up to here, and whether what was added to it is to be learnt
Tokens = tuple[list[int], list[int]]  # ids and labels, of one length


def encode(row: Mapping[str, Any], tokenizer: Any) -> Tokens:
    """Return the ids of a row and its labels, -100 for what is not to be learnt.

    Learnt are texts, completions, and what the assistant says; each ends with the end of text,
    unless the chat template ends a turn with it already.

    Args:
        row: has "text", "prompt" and "completion", or "messages".
        tokenizer: a transformers tokenizer with an end-of-text token.

    Raises:
        ValueError: a conversation that the tokenizer's chat template cannot render in steps.
    """
    end = tokenizer.eos_token_id
    if "messages" in row:
        return _close_chat(*_chat(row["messages"], tokenizer), end)
    if "text" in row:
        return _close(*grow([(row["text"], True)], tokenizer), end)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return _close(*grow([(prompt, False), (prompt + completion, True)], tokenizer), end)
    steps = [
        (_render(tokenizer, prompt, add_generation_prompt=True), False),
        (_render(tokenizer, prompt + completion), True),
    ]
    return _close_chat(*grow(_check_steps(steps), tokenizer, special=False), end)


def grow(steps: Iterable[Step], tokenizer: Any, special: bool = True) -> Tokens:
    """Tokenize a text that grows step by step, so that each step continues the tokens before it.

    At inference the model continues the tokens of the prompt alone. Where the prompt's last token
    and the first of what follows would become one token, what follows is tokenized by itself.

    Args:
        steps: the text so far, which begins with that of the step before, and whether the new part
            is to be learnt.
        tokenizer: a transformers tokenizer.
        special: whether it adds what it puts at the beginning of a text.
    """
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for text, learnt in steps:
        whole = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if special and whole and whole[-1] == tokenizer.eos_token_id:
            whole = whole[:-1]
        if whole[: len(ids)] != ids:
            rest = tokenizer(text[len(before) :], add_special_tokens=False, verbose=False)
            whole = ids + rest["input_ids"]
        new = whole[len(ids) :]
        labels += new if learnt else [IGNORED] * len(new)
        ids, before = whole, text
    return ids, labels


def windows(tokens: Tokens, size: int) -> list[Tokens]:
    """Cut tokens into pieces of `size`, the last one shorter.

    Each piece begins with the last token of the one before, which is not to be learnt again: so
    every token but the first of all is predicted once, by what precedes it.

    Args:
        tokens: ids and labels, of one length.
        size: at least 2.

    Example:
        >>> windows(([1, 2, 3, 4], [1, 2, 3, 4]), size=3)
        [([1, 2, 3], [1, 2, 3]), ([3, 4], [-100, 4])]
    """
    ids, labels = tokens
    starts = range(0, max(len(ids) - 1, 1), size - 1)
    pieces = [(ids[i : i + size], labels[i : i + size]) for i in starts]
    return [pieces[0], *((ids, [IGNORED, *labels[1:]]) for ids, labels in pieces[1:])]


def learns(labels: Sequence[int]) -> bool:
    """Tell whether a model that predicts each token by those before it has something to learn."""
    return any(label != IGNORED for label in labels[1:])


def _chat(messages: list[Any], tokenizer: Any) -> Tokens:
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        found = _render(tokenizer, messages, return_assistant_tokens_mask=True)
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        return found["input_ids"], [token if mask else IGNORED for token, mask in pairs]
    steps: list[Step] = []
    said = accumulate(([message] for message in messages), list.__add__)
    for so_far in said:
        if so_far[-1]["role"] == "assistant":
            # Who speaks next is not to be learnt, only what the assistant says and its end.
            steps.append((_render(tokenizer, so_far[:-1], add_generation_prompt=True), False))
            steps.append((_render(tokenizer, so_far), True))
    return grow(_check_steps(steps), tokenizer, special=False)


def _render(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    tokenize = "return_assistant_tokens_mask" in options
    options |= {"tokenize": tokenize, "return_dict": tokenize}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses the conversation that begins with "
            f"{messages[:1]}: {error}"
        ) from error


def _check_steps(steps: list[Step]) -> list[Step]:
    texts = ["", *(text for text, _ in steps)]
    for before, after in pairwise(texts):
        if not after.startswith(before):
            raise ValueError(
                "the tokenizer's chat template changes what was said before when a message is "
                f"added: {before[-60:]!r} is not in {after[-200:]!r}; mark what the assistant says "
                "with {% generation %} in tokenizer.chat_template, or give prompts and completions"
            )
    return steps


def _close(ids: list[int], labels: list[int], end: int) -> Tokens:
    return (ids, labels) if ids[-1:] == [end] else ([*ids, end], [*labels, end])


def _close_chat(ids: list[int], labels: list[int], end: int) -> Tokens:
    """Let the end of text after what is learnt be learnt; add it where the last turn has none."""
    before = zip([IGNORED, *labels], ids, labels, strict=False)
    labels = [token if token == end and last != IGNORED else label for last, token, label in before]
    turn = next((i for i in range(len(labels), 0, -1) if labels[i - 1] == IGNORED), 0)
    if turn < len(ids) and end not in ids[turn:]:
        return [*ids, end], [*labels, end]
    return ids, labels
