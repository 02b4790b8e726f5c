"""`graftune protocol`: an adapter judged over several seeds, as papers compare them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from graftune.adapters.base.messages import listing, nearest
from graftune.cli.adapt import adapt, check_method
from graftune.cli.data import pictures, short_name
from graftune.cli.errors import UsageError
from graftune.cli.options import TrainOptions
from graftune.cli.parsing import OptionParser
from graftune.cli.report import console, quiet, table
from graftune.cli.training_options import ELSEWHERE, TrainArguments
from graftune.integrations.data import select_classes
from graftune.integrations.libraries.base_models import load_base_model
from graftune.integrations.protocols import (
    ProtocolResult,
    Study,
    base_to_novel,
    cross_dataset,
    few_shot_curve,
)
from graftune.integrations.sharing import versions

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
    _check_options(options)
    quiet()
    result = _PROTOCOLS[name](options, _study(options, args))
    _with_splits(result, options)
    if args.process_index == 0:
        _write(result, options, Path(args.output_dir))
    _end_together()


def _end_together() -> None:
    """End in all processes at once: one that is still writing needs the others."""
    gc.collect()  # trainers, whose wrapped models hold the processes' group
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def _check_options(options: ProtocolOptions) -> None:
    """Refuse what a protocol would pass over: it keeps no adapter and learns by class names."""
    uses = {
        "objective": options.objective in (None, "class_names"),
        "resume": options.resume is None,
        "push_to": options.push_to is None,
    }
    for name, fits in uses.items():
        if not fits:
            raise UsageError(
                f"a protocol has no use for `{name}`: it trains anew for every seed, by class "
                "names, and keeps the numbers alone; leave it out, or say `graftune train`"
            )


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
        epoch_rates=args.epoch_rates(options.first_epoch_rate),
    )


def _shots(options: ProtocolOptions) -> int:
    return 16 if options.shots is None else options.shots


def _test_source(options: ProtocolOptions) -> str:
    return str(options.eval_data or options.data)


def _data(options: ProtocolOptions) -> tuple[Any, Any]:
    """The pictures, and those to measure on where they are apart, each of the named classes."""
    data = _of_classes(pictures(options, str(options.data), options.split), options)
    if options.eval_data is None and options.eval_split is None:
        return data, None
    test = pictures(options, _test_source(options), options.eval_split or options.split)
    return data, _of_classes(test, options)


def _of_classes(data: Any, options: ProtocolOptions) -> Any:
    """The pictures of the classes that are named; what halves are for, the protocol says."""
    if options.classes in (["all"], ["first-half"], ["second-half"]):
        return data
    return select_classes(data, options.classes)


def _base_to_novel(options: ProtocolOptions, study: Study) -> ProtocolResult:
    data, test = _data(options)
    return base_to_novel(
        study,
        data,
        test=test,
        shots=_shots(options),
        seeds=options.seeds,
        source=str(options.data),
        test_source=_test_source(options),
    )


def _few_shot(options: ProtocolOptions, study: Study) -> ProtocolResult:
    data, test = _data(options)
    return few_shot_curve(
        study,
        data,
        test=test,
        shots=options.counts,
        seeds=options.seeds,
        source=str(options.data),
        test_source=_test_source(options),
    )


def _cross_dataset(options: ProtocolOptions, study: Study) -> ProtocolResult:
    split, shots = options.eval_split or options.split, _shots(options)
    others = {short_name(name): pictures(options, name, split) for name in options.others}
    data = _of_classes(pictures(options, str(options.data), options.split), options)
    return cross_dataset(
        study, data, others, shots=shots, seeds=options.seeds, source=str(options.data)
    )


def _with_splits(result: ProtocolResult, options: ProtocolOptions) -> None:
    """Note in the record which part of the data was trained on, and which measured on."""
    apart = options.eval_split or options.split
    has_test = options.eval_data is not None or options.eval_split is not None
    result.selections = [replace(chosen, split=options.split) for chosen in result.selections]
    result.measured = [
        {
            # "source" is what cross-dataset leaves of the data it trains on.
            name: replace(chosen, split=apart if has_test and name != "source" else options.split)
            for name, chosen in of_run.items()
        }
        for of_run in result.measured
    ]


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
        "recipe": options.method,
        "adapter": options.adapter_fields,
        "regularizers": options.given_regularizers,
        "template": options.template,
        **result.to_dict(),
        "versions": versions(),
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    say(f"Written to {file}")
