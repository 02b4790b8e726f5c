"""The command `graftune`: which commands there are, and how each of them ends."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from torch import distributed

from graftune.adapters.base.messages import listing, nearest
from graftune.cli.errors import UsageError, is_expected, said

# The commands: the module with a function `run(arguments)`, imported when the command is used, and
# what the command does.
COMMANDS = {
    "train": ("train", "train an adapter as a YAML file and the command line say"),
    "protocol": ("protocol", "compare over several seeds: base-to-novel, few-shot, cross-dataset"),
    "eval": ("evaluate", "measure a base model without and with an adapter"),
    "inspect": ("inspect_adapter", "show what an adapter is and how it was trained"),
    "merge": ("merge", "write the base model with an adapter merged in"),
    "export": ("export", "write an adapter in a form that loads without graftune"),
    "push": ("push", "publish an adapter on the Hub"),
    "recipes": ("recipe_list", "list the recipes with their papers and defaults"),
}
FAILED = 2
INTERRUPTED = 130  # what shells report of a program that was stopped by Ctrl+C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. Commands: {listing(COMMANDS)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: what comes after `graftune`; None takes that of this process.

    Returns:
        0; 2 for a failure with a known cause, of which one line on stderr tells; 130 when stopped.

    Example:
        >>> main(["inspect", "outputs/adapter"])
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Known before anything is parsed, so that it holds for errors in parsing as well.
    debug = given[:1] == ["--debug"]
    try:
        _run(given)
    except SystemExit as error:  # of --help and --version
        return int(error.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug or not (isinstance(error, KeyboardInterrupt) or is_expected(error)):
            raise
        return _failed(error)
    return 0


def _run(given: Sequence[str]) -> None:
    if not given:
        raise UsageError(f"give a command: {listing(COMMANDS)}; or --help")
    options = _parser().parse_args(given)
    if options.command not in COMMANDS:
        raise UsageError(
            f"there is no command {options.command!r}.{nearest(options.command, COMMANDS)} "
            f"Commands: {listing(COMMANDS)}."
        )
    module = importlib.import_module(f"graftune.cli.{COMMANDS[options.command][0]}")
    with warnings.catch_warnings():
        # Of PEFT's making, for transformers' developers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        module.run(options.arguments)


def _parser() -> argparse.ArgumentParser:
    from graftune import __version__

    lines = [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    parser = _Parser(
        prog="graftune",
        description="Adapt a pretrained model without making it forget.",
        epilog="\n".join(["commands:", *lines, "", "`graftune COMMAND --help` explains each."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graftune {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from; before the command"
    )
    parser.add_argument("command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the command takes")
    return parser


def _failed(error: Exception | KeyboardInterrupt) -> int:
    """Say in one line on stderr what went wrong, and return the exit code.

    Before the processes of a launcher have met they read the same files and fail alike, which one
    of them says; later each may have a cause of its own.
    """
    number = int(os.environ.get("RANK", "0"))
    if not number or (distributed.is_available() and distributed.is_initialized()):
        who = f"graftune (process {number})" if number else "graftune"
        what = "stopped" if isinstance(error, KeyboardInterrupt) else said(error)
        print(f"{who}: {what}", file=sys.stderr)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
