"""What is learnt of a text that grows, and how tokens are cut, for any of them."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftune.integrations.data.tokens import encode, grow, learns, windows
from support.text import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer()
texts = st.text(alphabet="the capitl ofFrnsP\n<|>", max_size=12)


def learnt(row: dict[str, Any], tokenizer: Any = TOKENIZER) -> str:
    ids, labels = encode(row, tokenizer)
    assert len(ids) == len(labels)
    return tokenizer.decode([token for token in labels if token != -100])


@given(prompt=texts, completion=texts)
def test_prompts_keep_the_tokens_of_inference(prompt: str, completion: str) -> None:
    ids, labels = encode({"prompt": prompt, "completion": completion}, TOKENIZER)
    alone = TOKENIZER(prompt)["input_ids"]
    assert ids[: len(alone)] == alone
    assert labels[: len(alone)] == [-100] * len(alone)
    assert labels[len(alone) :] == ids[len(alone) :]
    assert TOKENIZER.decode(ids) == prompt + completion + "<|end|>"


@given(parts=st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=5))
def test_each_step_continues_the_one_before(parts: list[tuple[str, bool]]) -> None:
    said = accumulate(part for part, _ in parts)
    steps = [(text, is_learnt) for text, (_, is_learnt) in zip(said, parts, strict=True)]
    ids, labels = grow(steps, TOKENIZER)
    assert TOKENIZER.decode(ids) == steps[-1][0]
    wanted = "".join(part for part, is_learnt in parts if is_learnt)
    assert TOKENIZER.decode([token for token in labels if token != -100]) == wanted


@given(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=40), size=st.integers(2, 9))
def test_windows_predict_every_token_once(tokens: list[int], size: int) -> None:
    pieces = windows((tokens, tokens), size)
    assert all(len(ids) == len(labels) <= size for ids, labels in pieces)
    assert all(len(ids) == size for ids, _ in pieces[:-1])
    assert pieces[0][0] + [t for ids, _ in pieces[1:] for t in ids[1:]] == tokens
    assert pieces[0][1] + [t for _, labels in pieces[1:] for t in labels[1:]] == tokens
    assert all(ids[0] == before[-1] for (before, _), (ids, _) in pairwise(pieces))
    assert all(learns(labels) for _, labels in pieces) == (len(tokens) > 1)


def test_the_end_is_there_once() -> None:
    assert learnt({"text": "the"}) == "the<|end|>"
    assert learnt({"text": "the<|end|>"}) == "the<|end|>"
    assert learnt({"prompt": "the", "completion": " capital<|end|>"}) == " capital<|end|>"


def with_specials() -> Any:
    """A tokenizer that puts a beginning before and an end after every text, as T5's and BERT's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|end|>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=list(ids.items())
    )
    return tokenizer


def test_a_tokenizers_own_beginning_and_end_are_there_once() -> None:
    tokenizer = with_specials()
    row = {"prompt": "the", "completion": " capital"}
    assert tokenizer.decode(encode(row, tokenizer)[0]) == "<|im_start|>the capital<|end|>"
    assert learnt(row, tokenizer) == " capital<|end|>"
    assert learnt({"text": "the"}, tokenizer) == "<|im_start|>the<|end|>"


QUESTION = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "capital"}]
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{{ '<|im_end|>' + '\n' }}",
)


@pytest.mark.parametrize(
    ("end", "template", "expected"),
    [
        ("<|im_end|>", CHATML, "capital<|im_end|>\n"),
        ("<|end|>", CHATML, "capital<|im_end|>\n<|end|>"),
        ("<|im_end|>", MARKED, "capital<|im_end|>"),
    ],
)
def test_the_assistants_turn_ends(end: str, template: str, expected: str) -> None:
    assert "{% generation" in MARKED
    tokenizer = byte_tokenizer(end, template)
    assert learnt({"messages": QUESTION}, tokenizer) == expected
    twice = learnt({"messages": QUESTION * 2}, tokenizer)
    assert twice.count("capital<|im_end|>") == 2
    assert learnt({"messages": QUESTION[:1]}, tokenizer) == ""


def test_rows_of_nulls_are_as_rows_without() -> None:
    nulls = [{**message, "name": None} for message in QUESTION]
    assert encode({"messages": nulls}, TOKENIZER) == encode({"messages": QUESTION}, TOKENIZER)
