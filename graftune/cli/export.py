"""`graftune export`: an adapter in a form that loads without graftune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftune.adapters.base.messages import listing
from graftune.cli.errors import UsageError
from graftune.cli.merge import MergeOptions, save_processor, show_report, wanted_output
from graftune.cli.options import option
from graftune.cli.parsing import OptionParser
from graftune.cli.published import attach, base_of, find
from graftune.cli.report import add_json, quiet
from graftune.integrations.sharing.export import (
    export_difference,
    export_locon,
    export_lora,
    export_merged,
)

FORMATS = ("lora", "locon", "merged", "diff")


@dataclass
class ExportOptions(MergeOptions):
    """What `graftune export` takes beside the adapter."""

    to: Literal["lora", "locon", "merged", "diff"] | None = option(
        None,
        "A LoRA of PEFT (a folder), a LoCon of LyCORIS (a .safetensors file), the merged model (a "
        "folder), or the difference of the weights (a .safetensors file).",
    )
    rank: int | None = option(
        None, "Largest rank, for a lora or locon of what is none exactly; its error is told."
    )


def run(arguments: Sequence[str]) -> None:
    """Write an adapter in a form that loads without graftune."""
    parser = OptionParser(
        "export", "write an adapter in a form that loads without graftune", [ExportOptions]
    )
    parser.add_argument("adapter", help="the adapter's folder, or its id on the Hub")
    add_json(parser)
    options, given = parser.parse(arguments)
    output = wanted_output(options.output)
    if options.to is None:
        raise UsageError(f"there is no form to export to: give --to, one of {listing(FORMATS)}")
    if options.rank is not None and options.to not in ("lora", "locon"):
        raise UsageError(f"--rank is for lora and locon; {options.to} is exact")
    quiet()
    adapter = find(given.adapter)
    base = base_of(adapter, options.model, revision=options.revision, dtype=options.dtype)
    model = attach(adapter, base)
    if options.to == "lora":
        report = export_lora(model, output, rank=options.rank)
    elif options.to == "locon":
        report = export_locon(model, output, rank=options.rank)
    elif options.to == "diff":
        report = export_difference(model, output)
    else:
        report = export_merged(model, output)
        save_processor(base, output)
    show_report(report, given.json)
