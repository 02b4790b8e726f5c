"""What people wrote into a model card, told apart from what libraries filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from huggingface_hub import ModelCard, ModelCardData

# Between these lines stands what graftune writes. Cards are known again by them: they never change.
BEGIN = "<!-- graftune: begin -->"
END = "<!-- graftune: end -->"

_PLACEHOLDER = "[More Information Needed]"
_TRANSFORMERS_SENTENCE = "This is the model card of a 🤗 transformers model"
# PEFT appends its version to any card that does not name it.
_PEFT_VERSION = re.compile(r"\s*^### Framework versions\s+- PEFT [^\n]+\s*\Z", re.MULTILINE)
_HEADING = re.compile(r"(#{1,6}) ")


@dataclass
class _Section:
    level: int = 0
    heading: str = ""
    body: list[str] = field(default_factory=list)


def own_words(text: str) -> tuple[str, str]:
    """Return what people wrote above and below graftune's part of a card's text.

    Dropped are graftune's part, PEFT's version, and the template with which PEFT and transformers
    begin a card, as far as nobody filled it in. A text without any of these comes back as it is.

    Args:
        text: a card without its metadata.
    """
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        return "", _without_template(text)
    _, _, after = rest.partition(END)
    return _without_template(before), _without_template(after)


def _without_template(text: str) -> str:
    text = _PEFT_VERSION.sub("", text)
    if _PLACEHOLDER in text:
        text = _filled_in(text)
    return text.strip("\n")


def _filled_in(text: str) -> str:
    """Drop a template's lines, and then its headings that have nothing below them."""
    kept: list[_Section] = []
    for section in reversed(_sections(text)):
        is_own = section.heading != "" and section.heading not in _template()
        # What `kept` ends with comes next in the text: a part of this section when it is deeper.
        has_parts = section.level > 1 and bool(kept) and kept[-1].level > section.level
        if is_own or has_parts or any(line.strip() for line in section.body):
            kept.append(section)
    return "\n\n".join(_text(section) for section in reversed(kept))


def _sections(text: str) -> list[_Section]:
    """Cut a text at its headings, without the template's lines."""
    sections = [_Section()]
    in_code = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        heading = None if in_code else _HEADING.match(line)
        if heading:
            sections.append(_Section(len(heading[1]), line.strip()))
        elif in_code or not _is_template(line):
            sections[-1].body.append(line)
    return sections


def _text(section: _Section) -> str:
    body = "\n".join(section.body).strip("\n")
    return "\n\n".join(part for part in (section.heading, body) if part)


def _is_template(line: str) -> bool:
    line = line.strip()
    return line in _template() or line.startswith(_TRANSFORMERS_SENTENCE)


@cache
def _template() -> frozenset[str]:
    lines = ModelCard.from_template(ModelCardData()).text.splitlines()
    return frozenset(line.strip() for line in lines if line.strip())
