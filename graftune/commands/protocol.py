"""`graftune protocol`: an adapter judged over several seeds, as papers compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftune.adapters.messages import listing, nearest
from graftune.commands.adapt import adapt, check_method
from graftune.commands.data import pictures, short_name
from graftune.commands.errors import UsageError
from graftune.commands.options import TrainOptions
from graftune.commands.parsing import OptionParser
from graftune.commands.report import console, quiet, table
from graftune.commands.training_options import ELSEWHERE, TrainArguments
from graftune.integrations.base_models import load_base_model
from graftune.integrations.hub import versions
from graftune.integrations.protocols import (
    ProtocolResult,
    Study,
    base_to_novel,
    cross_dataset,
    few_shot_curve,
)

PROTOCOLS = ("base-to-novel", "few-shot", "cross-dataset")


@dataclass
class ProtocolOptions(TrainOptions):
    """What `graftune protocol` takes beside what `graftune train` does."""

    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "One run each; a seed decides the pictures and the training."},
    )
    counts: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16],
        metadata={"help": "For few-shot: training pictures a class, one run each."},
    )
    others: list[str] = field(
        default_factory=list,
        metadata={"help": "For cross-dataset: the data sets to measure on."},
    )


def run(arguments: Sequence[str]) -> None:
    """Run a protocol as a file and the command line say."""
    parser = OptionParser(
        "protocol",
        "train and measure over several seeds: " + ", ".join(PROTOCOLS),
        [ProtocolOptions, TrainArguments],
        ELSEWHERE,
    )
    parser.usage = "graftune protocol NAME [RECIPE.yaml] [--key value] [--key.part value] ..."
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", arguments)
    if name not in PROTOCOLS and not name.startswith("-"):
        raise UsageError(
            f"there is no protocol {name!r}.{nearest(name, PROTOCOLS)} Protocols: "
            f"{listing(PROTOCOLS)}."
        )
    has_file = bool(rest) and not rest[0].startswith("-")
    file, keys = (rest[0], rest[1:]) if has_file else (None, rest)
    options, args = parser.parse_with_file(file, arguments if name.startswith("-") else keys)
    check_method(options)
    quiet()
    result = _PROTOCOLS[name](options, _study(options, args))
    if args.process_index == 0:
        _write(result, options, Path(args.output_dir))


def _study(options: ProtocolOptions, args: TrainArguments) -> Study:
    def load() -> Any:
        return load_base_model(
            str(options.model), "class_names", revision=options.revision, dtype=options.dtype
        )

    first = load()
    return Study(
        lambda: adapt(load(), options),
        first.transform,
        args,
        tokenizer=first.tokenizer,
        template=options.template,
    )


def _shots(options: ProtocolOptions) -> int:
    return 16 if options.shots is None else options.shots


def _data(options: ProtocolOptions) -> tuple[Any, Any]:
    """The pictures, and those to measure on where they are apart: all classes of both."""
    data = pictures(options, str(options.data), options.split)
    if options.eval_data is None and options.eval_split is None:
        return data, None
    where = options.eval_data or str(options.data)
    return data, pictures(options, where, options.eval_split or options.split)


def _base_to_novel(options: ProtocolOptions, study: Study) -> ProtocolResult:
    data, test = _data(options)
    shots, source = _shots(options), str(options.data)
    return base_to_novel(study, data, test=test, shots=shots, seeds=options.seeds, source=source)


def _few_shot(options: ProtocolOptions, study: Study) -> ProtocolResult:
    data, test = _data(options)
    counts, source = options.counts, str(options.data)
    return few_shot_curve(study, data, test=test, shots=counts, seeds=options.seeds, source=source)


def _cross_dataset(options: ProtocolOptions, study: Study) -> ProtocolResult:
    others = {short_name(name): pictures(options, name, options.split) for name in options.others}
    data, shots = _data(options)[0], _shots(options)
    return cross_dataset(
        study, data, others, shots=shots, seeds=options.seeds, source=str(options.data)
    )


_PROTOCOLS: dict[str, Callable[[ProtocolOptions, Study], ProtocolResult]] = {
    "base-to-novel": _base_to_novel,
    "few-shot": _few_shot,
    "cross-dataset": _cross_dataset,
}


def _write(result: ProtocolResult, options: ProtocolOptions, folder: Path) -> None:
    """Print mean and standard deviation over the seeds, and write everything as JSON."""
    summary = result.summary()
    settings = [name for name in summary[0] if name not in result.measures]
    cells = [
        [
            *(row[name] for name in settings),
            *(f"{row[m]['mean']:.1f} ± {row[m]['std']:.1f}" for m in result.measures),
        ]
        for row in summary
    ]
    say = console().print
    say(
        table(
            [*settings, *result.measures],
            cells,
            f"{result.protocol}, %, {len(options.seeds)} seeds",
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result.protocol}.json"
    content = {
        "model": options.model,
        "recipe": options.recipe,
        "adapter": options.adapter_fields,
        "template": options.template,
        **result.to_dict(),
        "versions": versions(),
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    say(f"Written to {file}")
