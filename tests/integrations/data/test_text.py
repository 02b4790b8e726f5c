"""Texts, prompts with completions and conversations, from files and data sets to batches."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

import graftune
from graftune.integrations.data import load_texts, text_collator, tokenize_texts
from support.models import MODELS
from support.text import CHATML, byte_tokenizer

CHAT = [
    {"role": "system", "content": "the"},
    {"role": "user", "content": "capital"},
    {"role": "assistant", "content": "Paris"},
]
PROMPTS = [
    {"prompt": "the capital of France is", "completion": " Paris"},
    {"prompt": "the capital ", "completion": "Paris"},
]


def lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def texts(data: datasets.Dataset) -> list[str]:
    assert data.column_names == ["text"]
    return list(data["text"])


def test_json_lines_and_lists(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two", "id": 1}, {"text": "drei ß"}]
    assert texts(load_texts(lines(tmp_path / "a.jsonl", *rows))) == ["one\u2028two", "drei ß"]
    assert texts(load_texts(str(lines(tmp_path / "a.json", *rows))))[1] == "drei ß"
    listed = written(tmp_path / "b.json", "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False))
    assert texts(load_texts(listed)) == ["one\u2028two", "drei ß"]
    named = lines(tmp_path / "c.jsonl", {"body": "one", "text": "other"})
    assert texts(load_texts(named, text="body")) == ["one"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "one\r\ntwo\n")
    assert texts(load_texts(tmp_path / "a.txt")) == ["one\ntwo\n"]
    (tmp_path / "more").mkdir()
    written(tmp_path / "more" / "b.txt", "three")
    written(tmp_path / "more" / ".hidden.txt", "four")
    assert texts(load_texts(tmp_path)) == ["one\ntwo\n", "three"]
    assert texts(load_texts(["one", "two"])) == ["one", "two"]


def test_prompts_and_conversations(tmp_path: Path) -> None:
    assert load_texts(lines(tmp_path / "a.jsonl", *PROMPTS)).to_list() == PROMPTS
    chats = lines(tmp_path / "b.jsonl", {"messages": CHAT}, {"messages": CHAT[1:]})
    assert load_texts(chats)[1] == {"messages": CHAT[1:]}
    parts = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    assert load_texts(lines(tmp_path / "c.jsonl", parts)).to_list() == [parts]


def test_data_sets_and_saved_ones(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": "no", "messages": CHAT, "id": 1}])
    assert load_texts(data).column_names == ["messages"]
    assert texts(load_texts(data, text="prompt")) == ["no"]
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved", split="test")[0]["messages"] == CHAT


LINES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ('{"text": "x"}\n\n{"text": \n', r"line 3 of .*bad\.jsonl is not JSON: Expecting"),
    "not a list": ('[{"text": "x"},\n', r"line 2 of .*bad\.jsonl is not JSON"),
    "empty": ("\n \n", r"bad\.jsonl is empty"),
    "empty list": ("[]", r"bad\.jsonl is empty"),
    "not UTF-8": (b'{"text": "\xff"}', r"bad\.jsonl is not UTF-8: invalid start byte at byte 10"),
    "no text": ('{"txt": "x"}', r"no 'text', .* in line 1 of .* only 'txt'. Did you mean 'txt'"),
    "other columns": ('{"text": "x"}\n{"id": 1}', r"line 2 of .* has no 'text', only 'id'"),
    "a number": ('{"text": 3}', r"'text' of line 1 of .* is of type int, not a text"),
    "nothing": ('{"text": "x"}\n{"text": null}', r"'text' of line 2 of .* is missing"),
    "not an object": ('"x"', r"line 1 of .* is of type str, not an object"),
    "no content": ('{"messages": [{"role": "user"}]}', r"message 0 .* no text as its 'content'"),
    "no messages": ('{"messages": []}', r"'messages' of line 1 of .* is empty, not a list"),
    "two kinds": (
        json.dumps(PROMPTS[0]) + "\n" + json.dumps({"prompt": CHAT[:2], "completion": CHAT[2:]}),
        r"'prompt' of line 2 of .* is of type list, in the rows before it is of type str",
    ),
}


@pytest.mark.parametrize("what", LINES)
def test_what_is_wrong_with_a_file_is_said_with_its_line(what: str, tmp_path: Path) -> None:
    content, message = LINES[what]
    with pytest.raises(ValueError, match=message) as it:
        load_texts(written(tmp_path / "bad.jsonl", content))
    assert "\n" not in str(it.value)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.txt"):
        load_texts(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        load_texts(tmp_path)
    with pytest.raises(ValueError, match=r"a\.jsnl is none of .*Did you mean '\.jsonl'"):
        load_texts(lines(tmp_path / "a.jsnl"))
    with pytest.raises(ValueError, match="the list of texts is empty"):
        load_texts([])
    with pytest.raises(ValueError, match="'text' of item 1 of the list is of type int"):
        load_texts(["x", 3])
    with pytest.raises(ValueError, match="split 'test' is not in the data, only 'train'"):
        load_texts(["x"], split="test")
    with pytest.raises(ValueError, match=r"no 'body' in the data, only 'text'.*text=\.\.\."):
        load_texts(datasets.Dataset.from_list([{"text": "x"}]), text="body")
    with pytest.raises(ValueError, match="the data have no rows"):
        load_texts(datasets.Dataset.from_dict({"text": []}))
    with pytest.raises(TypeError, match="data of type int are not known; give a list of texts"):
        load_texts(3)


def shown(data: datasets.Dataset, tokenizer: Any) -> list[str]:
    """The rows as text, what is learnt in brackets."""
    rows = []
    for row in data:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        text = "".join(
            f"[{tokenizer.decode([token])}]" if label == token else tokenizer.decode([token])
            for token, label in pairs
        )
        assert all(b in (-100, a) for a, b in zip(row["input_ids"], row["labels"], strict=True))
        rows.append(text.replace("][", ""))
    return rows


def test_texts_end_and_prompts_are_not_learnt() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize_texts(load_texts(["the capital", "of France"]), tokenizer, 20)
    assert shown(data, tokenizer) == ["[the capital<|end|>]", "[of France<|end|>]"]
    data = tokenize_texts(datasets.Dataset.from_list(PROMPTS), tokenizer, 20)
    assert shown(data, tokenizer) == [
        "the capital of France is[ Paris<|end|>]",
        "the capital [Paris<|end|>]",
    ]


def test_conversations_are_learnt_where_the_assistant_speaks() -> None:
    tokenizer = byte_tokenizer("<|im_end|>")
    more = [{"role": "user", "content": "of"}, {"role": "assistant", "content": "France"}]
    rows = [{"messages": CHAT + more}, {"messages": CHAT + more[:1]}]
    first = (
        "<|im_start|>system\nthe<|im_end|>\n<|im_start|>user\ncapital<|im_end|>\n"
        "<|im_start|>assistant\n[Paris<|im_end|>\n]"
    )
    second = "<|im_start|>user\nof<|im_end|>\n<|im_start|>assistant\n[France<|im_end|>\n]"
    data = tokenize_texts(datasets.Dataset.from_list(rows), tokenizer, 200)
    assert shown(data, tokenizer) == [first + second, first]
    parts = datasets.Dataset.from_list([{"prompt": CHAT[:2], "completion": CHAT[2:]}])
    assert shown(tokenize_texts(parts, tokenizer, 200), tokenizer) == [first]


def test_longer_texts_are_cut_into_rows_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    source = load_texts(["the capital of France is Paris", "the", ""])
    data = tokenize_texts(source, tokenizer, 4)
    assert shown(data, tokenizer) == [
        "[the capital of France]",
        " France[ is Paris<|end|>]",
        "[the<|end|>]",
    ]
    assert caplog.messages == [
        "1 of 3 texts have more than max_length = 4 tokens (the longest has 7): they are cut into "
        "several rows",
        "1 of 3 rows are left out: none has anything to learn (two tokens of a text, or a token of "
        "a completion or of what the assistant says, among the first max_length)",
    ]


def test_longer_prompts_lose_their_end(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    long = {"prompt": "the capital of France is Paris", "completion": " is Paris"}
    data = tokenize_texts(datasets.Dataset.from_list([PROMPTS[0], long]), tokenizer, 6)
    assert shown(data, tokenizer) == ["the capital of France is[ Paris]"]
    assert "2 of 2 texts have more than max_length = 6" in caplog.messages[0]
    assert "1 of 2 rows are left out" in caplog.messages[1]
    with pytest.raises(ValueError, match="none of the 1 rows has anything to learn"):
        tokenize_texts(datasets.Dataset.from_list([long]), tokenizer, 6)


def test_packed_rows_are_full_and_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    data = tokenize_texts(datasets.Dataset.from_list(PROMPTS), tokenizer, 5, pack=True)
    assert shown(data, tokenizer) == [
        " is[ Paris<|end|>]the capital",
        " capital [Paris<|end|>]",
    ]
    assert not caplog.messages
    plain = load_texts(["the capital of France", "is Paris"])
    assert shown(tokenize_texts(plain, tokenizer, 4, pack=True), tokenizer) == [
        "[the capital of France]",
        " France[<|end|>is Paris]",
        " Paris[<|end|>]",
    ]


def test_wrong_lengths_and_tokenizers_are_refused() -> None:
    data, chat = load_texts(["the"]), datasets.Dataset.from_list([{"messages": CHAT}])
    with pytest.raises(ValueError, match="max_length is 9; it must be 2 to 8, which the tokenizer"):
        tokenize_texts(data, byte_tokenizer(model_max_length=8), 9)
    with pytest.raises(ValueError, match="the tokenizer has no chat template; take"):
        tokenize_texts(chat, byte_tokenizer(template=None), 9)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token.*set tokenizer.eos_token"):
        tokenize_texts(data, endless, 9)
    forgetful = byte_tokenizer(template="{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match=r"changes what was said before.*\{% generation %\}"):
        tokenize_texts(chat, forgetful, 99)
    strict = byte_tokenizer(template="{{ raise_exception('no system here') }}")
    with pytest.raises(
        ValueError, match=r"refuses the conversation that begins with .*no system h"
    ):
        tokenize_texts(chat, strict, 99)


def test_padding_is_not_learnt_and_the_end_is() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token is None
    rows = list(tokenize_texts(datasets.Dataset.from_list(PROMPTS), tokenizer, 20))
    batch = text_collator(tokenizer)(rows)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for ids, labels, mask, row in zip(
        *(batch[n] for n in ("input_ids", "labels", "attention_mask")), rows, strict=True
    ):
        length = len(row["input_ids"])
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert labels[length - 1] == ids[length - 1] == end
        assert (labels[length:] == -100).all()


def test_a_language_model_learns_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    tokenizer = byte_tokenizer()
    base = MODELS["transformers-llama"].build()
    base.resize_token_embeddings(len(tokenizer))
    data = tokenize_texts(datasets.Dataset.from_list(PROMPTS * 4), tokenizer, 20)
    torch.manual_seed(0)
    trainer = graftune.Trainer(
        graftune.wrap(base, LoraConfig(r=4)),
        TrainingArguments(
            str(tmp_path),
            max_steps=20,
            learning_rate=0.05,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=data,
        data_collator=text_collator(tokenizer),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
