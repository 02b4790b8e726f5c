"""`graftune merge`: the base model with an adapter merged in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftune.cli.errors import UsageError
from graftune.cli.options import ModelOptions, option
from graftune.cli.parsing import OptionParser
from graftune.cli.published import attach, base_of, find
from graftune.cli.report import add_json, as_text, quiet, show, table
from graftune.integrations.libraries.base_models import BaseModel
from graftune.integrations.sharing.export import ExportReport, export_merged


@dataclass
class MergeOptions(ModelOptions):
    """What `graftune merge` takes beside the adapter."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "auto", "Type of the merged weights; auto is that of the base model's file."
    )
    output: str | None = option(None, "Where to write to.")


def run(arguments: Sequence[str]) -> None:
    """Write a base model with an adapter merged in."""
    parser = OptionParser("merge", "write the base model with an adapter merged in", [MergeOptions])
    parser.add_argument("adapter", help="the adapter's folder, or its id on the Hub")
    add_json(parser)
    options, given = parser.parse(arguments)
    output = wanted_output(options.output)
    quiet()
    adapter = find(given.adapter)
    base = base_of(adapter, options.model, revision=options.revision, dtype=options.dtype)
    report = export_merged(attach(adapter, base), output)
    save_processor(base, output)
    show_report(report, given.json)


def wanted_output(output: str | None) -> Path:
    """Return where to write to.

    Raises:
        UsageError: that was not said.
    """
    if not output:
        raise UsageError("there is no place to write to: give --output")
    return Path(output)


def save_processor(base: BaseModel, folder: Path) -> None:
    """Save a transformers model's tokenizer or image processor beside it."""
    processor: Any = base.tokenizer if base.tokenizer is not None else base.transform
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(str(folder))


def show_report(report: ExportReport, target: str | None) -> None:
    """Show what was written, and how far it is from the adapter."""
    content: dict[str, Any] = {
        "format": report.format,
        "files": [str(file) for file in report.files],
        "bytes": report.bytes,
        "tensors": report.tensors,
        "exact": report.exact,
        "relative_error": report.error,
        "max_rounding": report.max_rounding,
        "relative_errors": report.errors,
    }
    rows = [
        ("format", report.format),
        ("files", "\n".join(content["files"])),
        ("bytes", f"{report.bytes:,}"),
        ("tensors", report.tensors),
        ("exact", "yes, up to rounding" if report.exact else "no"),
    ]
    if not report.exact:
        worst = max(report.errors, key=lambda name: report.errors[name])
        rows.append(("relative error", as_text(report.error)))
        rows.append(("largest", f"{report.errors[worst]:.3g} of {worst}"))
    if report.max_rounding:
        rows.append(("largest rounding", as_text(report.max_rounding)))
    show(content, [table(("", ""), rows)], target)
