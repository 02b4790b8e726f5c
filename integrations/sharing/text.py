"""The text of a model card: sentences, the lines that load the adapter, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from graftune.integrations.libraries.snippet import loading_lines
from graftune.integrations.sharing.facts import AdapterFacts
from graftune.integrations.sharing.record import TrainingRecord

_LOADING = (
    "The first line makes the method known to PEFT; after it `peft.PeftModel.from_pretrained` and "
    "the libraries that build on PEFT load the adapter as well."
)
_BASE_CHECK = "compared with the base model when the adapter is loaded"


def card_text(facts: AdapterFacts, record: TrainingRecord | None, name: str, place: str) -> str:
    """Return the Markdown that graftune writes into a model card.

    Args:
        facts: what is known of the adapter.
        record: how it was trained, if that is known.
        name: the adapter's name, for the title.
        place: repository id or folder from which it is loaded.
    """
    note = "" if facts.base_id else base_left_out(facts)
    code = "\n".join(["```python", *loading_lines(facts, place), "```"])
    parts = [f"# {name}", note, _opening(facts), "## Loading it", code, _LOADING]
    parts += ["## What it holds", _table(("", ""), _holdings(facts))]
    if record is not None:
        parts += ["## How it was trained", _table(("", ""), _training(record))]
        if record.metrics:
            parts += ["## Results", _table(("data", "metric", "value"), _results(record))]
    return "\n\n".join(part for part in parts if part)


def base_left_out(facts: AdapterFacts) -> str:
    """Return the comment that says why a card's metadata has no `base_model`."""
    if facts.base_model is None:
        return "<!-- base_model is left out: no name of the base model was recorded -->"
    return f"<!-- base_model is left out: {facts.base_model} is no repository on the Hub -->"


def _opening(facts: AdapterFacts) -> str:
    sentence = f"An adapter for {_base(facts)}, made with graftune and PEFT."
    return f"{sentence} {facts.about}".strip()


def _base(facts: AdapterFacts) -> str:
    if facts.base_id:
        return f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
    if facts.base_model:
        return f"`{PurePath(facts.base_model).name}` (a local copy)"
    return f"a `{facts.base_class}`" if facts.base_class else "a base model without a recorded name"


def _holdings(facts: AdapterFacts) -> list[tuple[str, str]]:
    rows = [
        ("method", facts.method),
        ("settings", _pairs(facts.settings)),
        ("base model", _base(facts)),
    ]
    if facts.base_digest:
        # The sampled values that follow are long, and in adapter_config.json.
        version, structure, _ = facts.base_digest.split(":")
        rows.append(("base digest", f"`{version}:{structure}`, {_BASE_CHECK}"))
    stored = f"{facts.parameters:,} in {len(facts.shapes)} tensors ({', '.join(facts.dtypes)})"
    return [*rows, ("parameters", stored), ("file size", f"{facts.bytes:,} bytes")]


def _training(record: TrainingRecord) -> list[tuple[str, str]]:
    rows = [
        ("method", record.method),
        ("regularizers", "; ".join(_pairs(entry) for entry in record.regularizers)),
        ("objective", _pairs(record.objective)),
        ("data", _pairs(record.data)),
        ("hyperparameters", _pairs(record.hyperparameters)),
        ("seed", _value(record.seed)),
        ("steps", _value(record.steps)),
        ("epochs", _value(record.epochs)),
        ("seconds", _value(record.seconds)),
        ("hardware", _pairs(record.hardware)),
        ("versions", ", ".join(f"{name} {number}" for name, number in record.versions.items())),
    ]
    return [row for row in rows if row[1]]


def _results(record: TrainingRecord) -> list[tuple[str, str, str]]:
    return [
        (data, metric, _value(value))
        for data, metrics in record.metrics.items()
        for metric, value in metrics.items()
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    if isinstance(value, (list, tuple)):
        more = f", and {len(value) - 8} more" if len(value) > 8 else ""
        return f"[{', '.join(map(_value, value[:8]))}{more}]"
    return str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
