"""`graftune inspect`: what an adapter is and how it was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from graftune.adapters.base.folder import read_config
from graftune.adapters.mask_tuning import is_stored_mask, stored_masks
from graftune.cli.parsing import OptionParser
from graftune.cli.published import Published, find
from graftune.cli.report import add_json, as_text, show, table


def run(arguments: Sequence[str]) -> None:
    """Show what an adapter is and how it was trained."""
    parser = OptionParser("inspect", "show what an adapter is and how it was trained", [])
    parser.add_argument("adapter", help="the adapter's folder, or its id on the Hub")
    add_json(parser)
    (given,) = parser.parse(arguments)
    content = contents(find(given.adapter))
    show(content, _tables(content), given.json)


def contents(adapter: Published) -> dict[str, Any]:
    """Return everything that is known of an adapter.

    Example:
        >>> contents(find("outputs/adapter"))["parameters"]
        10752
    """
    facts = adapter.facts
    config = read_config(adapter.folder)
    return {
        "adapter": adapter.name,
        "method": facts.method,
        "about": facts.about,
        "settings": {k: v for k, v in facts.settings.items() if k != "regularizers"},
        "regularizers": getattr(config, "regularizers", None) or [],
        "base": {
            "name": facts.base_model,
            "revision": facts.base_revision,
            "class": facts.base_class,
            "library": facts.base_library,
            "digest": facts.base_digest,
            "task_type": facts.task_type,
        },
        "parameters": facts.parameters,
        "bytes": facts.bytes,
        "tensors": _tensors(adapter),
        "training": None if adapter.record is None else adapter.record.to_dict(),
    }


def _tensors(adapter: Published) -> list[dict[str, Any]]:
    with safe_open(adapter.folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        masks = stored_masks({n: file.get_tensor(n) for n in slices if is_stored_mask(n)})
        return [
            {
                "name": name,
                "shape": list(masks[name].shape) if name in masks else part.get_shape(),
                "dtype": part.get_dtype(),
            }
            | ({"masked": masks[name].share} if name in masks else {})
            for name, part in slices.items()
        ]


def _tables(content: dict[str, Any]) -> list[Any]:
    base = {name: value for name, value in content["base"].items() if value and name != "digest"}
    named = ({"name": None, **entry} for entry in content["regularizers"])
    regularizers = "; ".join(map(as_text, named))
    what = [
        ("method", content["method"]),
        ("settings", content["settings"]),
        ("regularizers", regularizers or "none"),
        ("base model", base or "not recorded"),
        ("base digest", _short(content["base"]["digest"])),
        ("parameters", f"{content['parameters']:,} in {len(content['tensors'])} tensors"),
        ("bytes", f"{content['bytes']:,}"),
        *_masked(content["tensors"]),
    ]
    tables = [table(("", ""), what, content["adapter"])]
    tables.append(_tensor_table(content["tensors"]))
    training = content["training"]
    if training is None:
        return [*tables, "How it was trained is not recorded."]
    metrics = [
        (data, metric, value)
        for data, found in training.pop("metrics", {}).items()
        for metric, value in found.items()
    ]
    tables.append(table(("", ""), _training_rows(training), "How it was trained"))
    if metrics:
        tables.append(table(("measured on", "metric", "value"), metrics, "Results", numbers=(2,)))
    return tables


def _masked(tensors: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The row that says which share of all the weights under the masks is masked."""
    sizes = [(t["masked"], math.prod(t["shape"])) for t in tensors if "masked" in t]
    if not sizes:
        return []
    weights = sum(size for _, size in sizes)
    share = sum(masked * size for masked, size in sizes) / weights
    return [("masked", f"{share:.2%} of {weights:,} weights")]


def _tensor_table(tensors: list[dict[str, Any]]) -> Any:
    shown = [(t["name"], ", ".join(map(str, t["shape"])), t["dtype"]) for t in tensors]
    if not any("masked" in tensor for tensor in tensors):
        return table(("tensor", "shape", "type"), shown, "Tensors", numbers=(1,))
    shares = [f"{t['masked']:.2%}" if "masked" in t else "" for t in tensors]
    rows = [(*row, share) for row, share in zip(shown, shares, strict=True)]
    return table(("tensor", "shape", "type", "masked"), rows, "Tensors", numbers=(1, 3))


def _training_rows(training: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = []
    for name, value in training.items():
        if name == "data":
            rows += [(f"data: {part}", entry) for part, entry in value.items()]
        else:
            rows.append((name, value))
    return rows


def _short(digest: str | None) -> str:
    """The part of a digest that people can compare: the sampled values after it are long."""
    return "not recorded" if digest is None else ":".join(digest.split(":")[:2])
