"""Class names and templates, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def clean_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return class names with underscores as spaces, after checking that each is there once.

    Raises:
        ValueError: no names, an empty name, or a name given twice.
        TypeError: one string instead of a list of them.
    """
    if isinstance(class_names, str):
        raise TypeError(f"class_names is the string {class_names!r}; give a list of names")
    names = [" ".join(str(name).replace("_", " ").split()) for name in class_names]
    if not names:
        raise ValueError("class_names is empty; give one name a class")
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ValueError(
            f"class_names[{empty[0]}] is {class_names[empty[0]]!r}: a name needs words"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"class_names has {', '.join(map(repr, twice[:5]))} more than once (underscores count "
            "as spaces); images of two classes with one name cannot be told apart"
        )
    return tuple(names)


def clean_templates(template: str | Sequence[str]) -> tuple[str, ...]:
    """Return the templates, after checking that each has a place for the name.

    Raises:
        ValueError: no templates, or one without exactly one `{}`.
    """
    templates = (template,) if isinstance(template, str) else tuple(template)
    if not templates:
        raise ValueError("template is empty; give at least one text with {} for the class name")
    for text in templates:
        if text.count("{}") != 1:
            raise ValueError(
                f"template {text!r} needs exactly one {{}} for the class name, as in "
                "'a photo of a {}.'"
            )
    return templates
