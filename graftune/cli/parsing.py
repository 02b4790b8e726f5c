"""From a YAML file and a command line to dataclasses, by transformers' parser."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from graftune.adapters.base.messages import nearest
from graftune.cli.errors import UsageError
from graftune.cli.yaml_file import Entry, parse_value, read_yaml


class OptionParser(HfArgumentParser):
    """transformers' parser of dataclasses, with errors of one line that name the nearest option.

    Args:
        command: the command, for its help.
        about: what it does.
        options: dataclasses whose fields are the options; `metadata["help"]` explains each.
        elsewhere: what to say of options that these do not have, by name.

    Example:
        >>> parser = OptionParser("inspect", "show an adapter", [InspectOptions])
        >>> parser.add_argument("adapter", help="folder or id on the Hub")
        >>> options, namespace = parser.parse(["outputs/adapter", "--json"])
    """

    def __init__(
        self,
        command: str,
        about: str,
        options: Sequence[type],
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            options,  # type: ignore[arg-type]
            prog=f"graftune {command}",
            description=f"{about[0].upper()}{about[1:]}.",
            allow_abbrev=False,
        )
        self._elsewhere = dict(elsewhere or {})
        self.hints = {
            name: hint for kind in options for name, hint in typing.get_type_hints(kind).items()
        }
        self.names = [f.name for kind in options for f in dataclasses.fields(kind) if f.init]

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of printing the usage, which is pages long."""
        raise UsageError(message)

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return the dataclasses and, where arguments were added, the namespace with these.

        Raises:
            UsageError: an option that there is not, a value of the wrong kind, or one too many.
        """
        for argument in arguments:
            option = argument.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                raise UsageError(f"there is no option {option}.{self.advice(option[2:])}")
        *found, rest = self.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise UsageError(f"{rest[0]!r} belongs to no option; texts with spaces need quotes")
        return tuple(found)

    def parse_with_file(self, file: str | None, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return the dataclasses of a YAML file with a command line on top of it.

        Args:
            file: the YAML file; its keys are the options.
            arguments: the command line; `--key.part value` sets a part of a key's mapping or list.

        Raises:
            FileNotFoundError: there is no such file.
            UsageError: see `parse`; of the file also by line.
        """
        entries = read_yaml(file) if file is not None else {}
        for key, entry in entries.items():
            if key not in self.names:
                where = f"{file}, line {entry.line}"
                raise UsageError(f"{where}: there is no key {key!r}.{self.advice(key)}")
        whole, dotted = _split_dotted(arguments)
        self._check_dotted(whole, dotted)
        in_file = self._from_file(file, entries)
        values = {key: entry.value for key, entry in entries.items()}
        for path, text in dotted:
            root = path[0]
            values[root] = _with_part(values.get(root), path[1:], parse_value(text), path)
            self.set_defaults(**{root: values[root]})
            in_file.pop(root, None)
        return self.parse([*in_file.values(), *whole])

    def advice(self, name: str) -> str:
        """Say what to write in the place of an option that there is not."""
        if name in self._elsewhere:
            return f" {self._elsewhere[name]}"
        known = [option[2:] for option in self._option_string_actions if option[:2] == "--"]
        return nearest(name.replace("-", "_"), [option for option in known if "-" not in option])

    def _from_file(self, file: str | None, entries: Mapping[str, Entry]) -> dict[str, str]:
        """Return the file's plain values as arguments; its mappings and lists become defaults."""
        arguments = {}
        for key, entry in entries.items():
            where = f"{file}, line {entry.line}: {key}"
            if isinstance(entry.value, (dict, list)):
                self.set_defaults(**{key: self._container(key, entry.value, where)})
            elif entry.value is not None:
                arguments[key] = f"--{key}={_as_text(entry.value)}"
                self._try_argument(arguments[key], where)
            elif self.get_default(key) is not None:
                raise UsageError(f"{where} has no value; give one, or leave the line out")
        return arguments

    def _try_argument(self, argument: str, where: str) -> None:
        try:
            self.parse_known_args([argument])
        except UsageError as error:
            reason = str(error).partition(": ")[2]
            raise UsageError(f"{where}: {reason}") from error

    def _container(self, key: str, value: dict | list, where: str) -> Any:
        allowed = _containers(self.hints[key])
        if type(value) not in allowed:
            kind = "a mapping" if isinstance(value, dict) else "a list"
            raise UsageError(f"{where} is {kind}; it takes {_takes(allowed)}")
        return [str(item) for item in value] if self.hints[key] == list[str] else value

    def _check_dotted(self, whole: Sequence[str], dotted: Sequence[tuple[list[str], str]]) -> None:
        for path, _ in dotted:
            option, root = f"--{'.'.join(path)}", path[0]
            if root not in self.names:
                raise UsageError(f"there is no option {option}.{self.advice(root)}")
            if not {dict, list} & _containers(self.hints[root]) or self.hints[root] == list[str]:
                raise UsageError(f"{option}: {root} is one value without parts; give --{root}")
            if any(argument.partition("=")[0] == f"--{root}" for argument in whole):
                raise UsageError(f"{option} and --{root} are both given; give one of them")


def _split_dotted(
    arguments: Sequence[str],
) -> tuple[list[str], list[tuple[list[str], str]]]:
    """Take `--key.part value` and `--key.part=value` out of a command line."""
    whole: list[str] = []
    dotted: list[tuple[list[str], str]] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, has_value, value = argument.partition("=")
        if not option.startswith("--") or "." not in option:
            whole.append(argument)
            continue
        text = value if has_value else next(remaining, None)
        if text is None:
            raise UsageError(f"{option} needs a value")
        dotted.append((option[2:].split("."), text))
    return whole, dotted


def _with_part(value: Any, path: Sequence[str], part: Any, whole: Sequence[str]) -> Any:
    """Return a copy of nested mappings and lists with one part set."""
    if not path:
        return part
    head, *rest = path
    if isinstance(value, str):  # a mapping in the words of YAML or JSON
        value = parse_value(value)
    if isinstance(value, list):
        if not head.isdigit() or int(head) >= len(value):
            raise UsageError(
                f"--{'.'.join(whole)}: {head!r} is no number of one of the list's {len(value)} "
                "entries, which are counted from 0"
            )
        changed = _with_part(value[int(head)], rest, part, whole)
        return [*value[: int(head)], changed, *value[int(head) + 1 :]]
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UsageError(f"--{'.'.join(whole)}: there are no parts in {value!r}")
    return {**value, head: _with_part(value.get(head), rest, part, whole)}


def _as_text(value: Any) -> str:
    """Return a plain value of YAML as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _containers(hint: Any) -> set[type]:
    """Return which of dict and list a type hint admits."""
    kinds: Iterable[Any] = typing.get_args(hint) or (hint,)
    origin = typing.get_origin(hint)
    if origin in (dict, list):
        return {origin}
    return {k for kind in kinds if (k := typing.get_origin(kind) or kind) in (dict, list)}


def _takes(allowed: set[type]) -> str:
    if not allowed:
        return "one value"
    return " or ".join("a mapping" if kind is dict else "a list" for kind in allowed)
