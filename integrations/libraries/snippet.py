"""The three lines that load an adapter onto its base model."""

from __future__ import annotations

from graftune.integrations.libraries.pipelines import pipeline_part
from graftune.integrations.sharing.facts import AdapterFacts

# transformers' automatic classes for PEFT's task types.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# Stands for a base model that is not on the Hub.
_NO_ID = "path/to/the/base/model"


def loading_lines(facts: AdapterFacts, place: str) -> list[str]:
    """Return three lines of Python that load an adapter; the first imports graftune.

    Without that import PEFT does not know the method.

    Args:
        facts: what is known of the adapter.
        place: its repository id or folder.
    """
    library = (facts.base_library or "").partition(".")[0]
    name = facts.base_class or "model"
    if facts.task_type in AUTO_CLASSES:
        library, name = "transformers", AUTO_CLASSES[facts.task_type]
    second, base = {
        "transformers": (
            f"from transformers import {name}",
            f"{name}.from_pretrained({_arguments(facts)})",
        ),
        "diffusers": (
            f"from diffusers import {name}",
            f"{name}.from_pretrained({_arguments(facts, pipeline_part(name))})",
        ),
        "timm": ("import timm", f"timm.create_model({_zoo_name(facts)}, pretrained=True)"),
        "open_clip": ("import open_clip", f"open_clip.create_model({_zoo_name(facts)})"),
    }.get(library, (f"base = ...  # the {name} that it was trained on", "base"))
    return ["import graftune", second, f'model = graftune.load({base}, "{place}")']


def _arguments(facts: AdapterFacts, part: str | None = None) -> str:
    arguments = [f'"{facts.base_id or _NO_ID}"']
    if part is not None:
        arguments.append(f'subfolder="{part}"')
    if facts.base_id and facts.base_revision:
        arguments.append(f'revision="{facts.base_revision}"')
    return ", ".join(arguments)


def _zoo_name(facts: AdapterFacts) -> str:
    """The name under which open_clip and timm find a model of the Hub."""
    return f'"hf-hub:{facts.base_id}"' if facts.base_id else '"name-of-the-base-model"'
