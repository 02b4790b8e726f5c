"""Text data: texts, prompts with completions, and conversations, as rows and as tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq

from graftune.integrations.data.conventions import checked, columns_of
from graftune.integrations.data.sources import check_split, open_source
from graftune.integrations.data.text_files import SUFFIXES, rows_of
from graftune.integrations.data.tokens import encode, learns, windows
from graftune.integrations.extras import require

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

NOTHING = (
    "anything to learn (two tokens of a text, or a token of a completion or of what the assistant "
    "says, among the first max_length)"
)


def load_texts(source: Any, *, text: str = "text", split: str = "train") -> Dataset:
    """Load texts for a language model from wherever they are.

    A row is a text, {"text": ...}; a prompt and what is to follow it, {"prompt": ..., "completion":
    ...}; or a conversation, {"messages": [{"role": ..., "content": ...}, ...]}: the conventions of
    TRL, whose trainers take the same data.

    Args:
        source: a file of JSON lines (.jsonl, .json), one row a line, or of one JSON list of rows; a
            .txt file, which is one text, or a folder of them, also in subfolders; the name of a
            data set on the Hub; a folder that `save_to_disk` wrote; a `datasets.Dataset` or
            `DatasetDict`; a list of texts. Files are UTF-8 and are read into memory.
        text: the column with the texts. Another name than "text" is taken before all conventions.
        split: which part to load, where there are parts.

    Returns:
        A data set with the columns "text", or "prompt" and "completion", or "messages".

    Raises:
        FileNotFoundError: no such file, folder or data set.
        ValueError: no such column or split, an empty file, a line that is not JSON or not a row.
        TypeError: the source is none of these.
        ImportError: the extra `train` is not installed.

    Example:
        >>> data = load_texts("conversations.jsonl")
        >>> data = load_texts("book.txt")
        >>> data = load_texts(open("one-text-a-line.txt").read().splitlines())
    """
    datasets = require("datasets")
    rows = rows_of(source)
    if rows is not None:
        check_split(split, ["train"])
        return datasets.Dataset.from_list(checked(rows, text))
    kinds = f"a list of texts, a file ({', '.join(SUFFIXES)}) or a folder of .txt files"
    data = open_source(source, split, kinds)
    if not len(data):
        raise ValueError("the data have no rows")
    names = columns_of(data.column_names, text)
    checked([("row 0", data[0])], text)  # the others have its types
    data = data.select_columns(names)
    return data if "text" in names or text not in names else data.rename_column(text, "text")


def tokenize_texts(data: Dataset, tokenizer: Any, max_length: int, pack: bool = False) -> Dataset:
    """Turn texts into tokens with labels for a causal language model.

    What is to be learnt has its token as label: texts, completions, and what the assistant says in
    a conversation, with the end of text after it. Prompts and everybody else have -100.

    Args:
        data: what `load_texts` returned.
        tokenizer: the model's transformers tokenizer; for conversations with a chat template.
        max_length: tokens a row has at most, 2 to what the model takes. A longer text is cut into
            several rows; of a longer prompt with completion, or conversation, the end is cut off.
            Both are said once.
        pack: put texts one after the other into rows of `max_length` tokens, so that none is cut
            off and little is padded. A row's texts see one another.

    Returns:
        A data set with the columns "input_ids" and "labels", rows of lists of integers; without
        the rows that have nothing to learn, which is said once.

    Raises:
        ValueError: a tokenizer without end of text or, for conversations, without a chat template
            that can be rendered message by message; `max_length` out of range; nothing to learn.

    Example:
        >>> data = tokenize_texts(load_texts("book.txt"), tokenizer, 512, pack=True)
        >>> trainer = Trainer(model, args, train_dataset=data,
        ...                   data_collator=text_collator(tokenizer))
    """
    names = columns_of(data.column_names)
    _check_tokenizer(tokenizer, max_length, conversations=_has_conversations(data, names))
    data = data.with_format(None).select_columns(names)
    tokens = data.map(
        _encode_row, remove_columns=names, fn_kwargs={"tokenizer": tokenizer}, desc="Tokenizing"
    )
    cut_off = not pack and names != ["text"]
    if not pack:
        what = "their end is cut off" if cut_off else "they are cut into several rows"
        _say_longer([len(ids) for ids in tokens["input_ids"]], max_length, what)
    if cut_off:
        tokens = tokens.map(_first_window, fn_kwargs={"size": max_length}, desc="Cutting")
    learnt = tokens.filter(learns, input_columns="labels", desc="Looking for what is learnt")
    left_out = len(tokens) - len(learnt)
    if not len(learnt):
        raise ValueError(f"none of the {len(tokens)} rows has {NOTHING}")
    if left_out:
        logger.warning("%d of %d rows are left out: none has %s", left_out, len(tokens), NOTHING)
    if cut_off:
        return learnt
    return learnt.map(
        _all_windows,
        batched=True,
        fn_kwargs={"size": max_length, "pack": pack},
        desc="Packing" if pack else "Cutting",
    )


def text_collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Return the collator for `tokenize_texts`: transformers', which pads labels with -100.

    A tokenizer without a padding token pads with its end of text, which the attention mask and the
    labels tell from the real one.
    """
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer)


def _has_conversations(data: Dataset, names: Sequence[str]) -> bool:
    return names == ["messages"] or not isinstance(data[0][names[0]], str)


def _check_tokenizer(tokenizer: Any, max_length: int, conversations: bool) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so a model could not learn where to end; set "
            "tokenizer.eos_token"
        )
    if not 2 <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; it must be 2 to {tokenizer.model_max_length}, which the "
            "tokenizer says the model takes (tokenizer.model_max_length)"
        )
    if conversations and not tokenizer.chat_template:
        raise ValueError(
            "the data are conversations and the tokenizer has no chat template; take the tokenizer "
            "of a model made for conversations, set tokenizer.chat_template, or give prompts and "
            "completions as texts"
        )


def _say_longer(lengths: list[int], most: int, what: str) -> None:
    longer = sum(length > most for length in lengths)
    if longer:
        logger.warning(
            "%d of %d texts have more than max_length = %d tokens (the longest has %d): %s",
            *(longer, len(lengths), most, max(lengths), what),
        )


def _encode_row(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    ids, labels = encode(row, tokenizer)
    return {"input_ids": ids, "labels": labels}


def _first_window(row: dict[str, list[int]], size: int) -> dict[str, list[int]]:
    return {name: values[:size] for name, values in row.items()}


def _all_windows(
    batch: dict[str, list[list[int]]], size: int, pack: bool
) -> dict[str, list[list[int]]]:
    rows = list(zip(batch["input_ids"], batch["labels"], strict=True))
    if pack:
        rows = [(list(chain(*batch["input_ids"])), list(chain(*batch["labels"])))]
    pieces = [piece for row in rows for piece in windows(row, size) if learns(piece[1])]
    return {
        "input_ids": [ids for ids, _ in pieces],
        "labels": [labels for _, labels in pieces],
    }
