"""The model card: what an adapter is, how it was trained, and the lines that load it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from graftune.integrations.sharing.facts import AdapterFacts, describe, is_repo_id
from graftune.integrations.sharing.fetch import CARD_NAME
from graftune.integrations.sharing.own_words import BEGIN, END, own_words
from graftune.integrations.sharing.record import KEY, TrainingRecord, parse_card, read_record
from graftune.integrations.sharing.text import base_left_out, card_text

# The Hub's tasks for PEFT's task types.
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
# The Hub refuses other names of data sets in a model index.
_DATA_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
_NOTE = "<!-- Written anew with every saving; what stands above and below is kept. -->"
_BASE_TAG = "base_model:adapter:"
# Keys that describe the weights at hand: not to be taken from another version's card.
_OURS = frozenset({"base_model", "library_name", "model-index", KEY})


def model_card(
    folder: str | Path,
    record: TrainingRecord | None = None,
    *,
    repo_id: str | None = None,
    published: str | None = None,
) -> str:
    """Return the model card of an adapter: YAML metadata and text.

    Text that people wrote into the folder's card stays, and so do metadata of their own, such as
    a licence; the rest is made from the adapter's files and the record.

    Args:
        folder: the adapter's folder.
        record: how it was trained; None takes the record in the folder's card, if there is one.
        repo_id: the repository that the card is for; None is for a local folder.
        published: the card that the repository has by now. Its own text is kept when the folder's
            card has none, its own metadata where the folder's card says nothing.

    Raises:
        ValueError: the folder's config or card cannot be read.

    Example:
        >>> print(model_card("outputs/adapter", repo_id="user/clip-emoji-flora"))
    """
    folder = Path(folder)
    cards = [_local_card(folder)]
    facts = describe(folder)
    facts = dataclasses.replace(facts, base_id=_base_id(facts, cards[0]))
    record = record or read_record(folder)
    if published is not None:
        cards.append(parse_card(published, f"{repo_id}/{CARD_NAME}"))
    name = Path(repo_id).name if repo_id else folder.resolve().name
    data = _metadata(facts, record, cards, name)
    part = card_text(facts, record, name=name, place=repo_id or name)
    texts = [own_words(card.text) for card in cards]
    above, below = next((pair for pair in texts if any(pair)), ("", ""))
    ours = f"{BEGIN}\n{_NOTE}\n\n{part}\n\n{END}"
    text = "\n\n".join(piece for piece in (above, ours, below) if piece)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def write_record(folder: str | Path, record: TrainingRecord) -> None:
    """Write how an adapter was trained into its model card.

    Args:
        folder: the adapter's folder; its card is made when there is none.
        record: how it was trained.

    Example:
        >>> model.save_pretrained("outputs/adapter")
        >>> write_record("outputs/adapter", TrainingRecord("flora", seed=0, steps=200))
    """
    _write(Path(folder), model_card(folder, record))


def refresh_card(folder: Path, record: TrainingRecord | None = None) -> None:
    """Make the card anew that PEFT or transformers has written beside an adapter.

    Theirs have no code that imports graftune, and may name a base model that is a local path, which
    the Hub refuses. People's own text is kept. Without a card or tensors nothing is done.

    Args:
        folder: the adapter's folder.
        record: how it was trained; None keeps the record that the card has.
    """
    if (folder / CARD_NAME).is_file() and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        _write(folder, model_card(folder, record))


def _write(folder: Path, text: str) -> None:
    (folder / CARD_NAME).write_text(text, encoding="utf-8", newline="")


def _local_card(folder: Path) -> ModelCard:
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\n\n---\n"
    return parse_card(text, str(path))


def _metadata(
    facts: AdapterFacts, record: TrainingRecord | None, cards: list[ModelCard], name: str
) -> ModelCardData:
    values: dict[str, Any] = {}
    for card in reversed(cards):
        values |= {k: v for k, v in card.data.to_dict().items() if k not in _OURS}
    results = _eval_results(facts, record) + _own_results(facts, cards[0])
    values |= {
        "base_model": facts.base_id,
        "library_name": "peft",
        "tags": _tags(facts, cards),
        "eval_results": results or None,
        "model_name": name if results else None,
    }
    if record is not None:
        values[KEY] = record.to_dict()
    return ModelCardData(**values)


def _base_id(facts: AdapterFacts, local: ModelCard) -> str | None:
    """The base model's id: as recorded, else as somebody wrote it into the card."""
    # A path may look like an id once its folder is out of sight: what was found stays.
    if facts.base_id and base_left_out(facts) not in local.text:
        return facts.base_id
    stated = local.data.get("base_model")
    return stated if is_repo_id(stated) else None


def _tags(facts: AdapterFacts, cards: list[ModelCard]) -> list[str]:
    tags = ["graftune", facts.method.lower()]
    if facts.method == "STACK":
        tags += facts.settings  # its methods
    if facts.base_id:
        tags.append(f"{_BASE_TAG}{facts.base_id}")
    for card in cards:
        tags += [tag for tag in card.data.get("tags", []) if not str(tag).startswith(_BASE_TAG)]
    return tags


def _eval_results(facts: AdapterFacts, record: TrainingRecord | None) -> list[EvalResult]:
    """A record's metrics as the Hub's model index has them: single values that are finite."""
    if record is None:
        return []
    return [
        EvalResult(
            task_type=record.task or _TASKS.get(facts.task_type or "", "other"),
            dataset_type=_data_type(data),
            dataset_name=data,
            metric_type=metric,
            metric_value=value,
        )
        for data, metrics in record.metrics.items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _own_results(facts: AdapterFacts, local: ModelCard) -> list[EvalResult]:
    """The results in a card that do not come from the record beside them."""
    values = local.data.get(KEY)
    written = _eval_results(facts, TrainingRecord.from_dict(values) if values else None)
    return [result for result in local.data.get("eval_results", []) if result not in written]


def _data_type(name: str) -> str:
    """A data set's name in the letters that the Hub allows for one."""
    if _DATA_TYPE.fullmatch(name):
        return name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "data"
