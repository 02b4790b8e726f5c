"""Repositories in memory, as the Hub keeps them, and the Hub's rules for a card's metadata."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

# What the `.gitattributes` that the Hub gives to a new repository puts into large-file storage.
LARGE = (".bin", ".ckpt", ".h5", ".onnx", ".pkl", ".pt", ".pth", ".safetensors")
# The pattern in the Hub's own error messages.
DATA_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Blob:
    """A file's content and where it is kept."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's hash of any other: the etag that the Hub sends."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


Tree = dict[str, Blob]


@dataclass
class Repository:
    """Commits and the branches that point to them; a new one has the Hub's first commit."""

    name: str
    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE)
        first = {".gitattributes": Blob(attributes.encode(), large=False)}
        self.branches["main"] = self._enter(first, "initial commit")

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a pull request or a commit's own hash."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def tree(self, revision: str) -> Tree:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, revision: str, changes: Tree, deleted: list[str], message: str) -> str:
        """Add a commit to a branch; a deleted folder's name ends with a slash."""
        kept = {
            path: blob
            for path, blob in self.tree(revision).items()
            if not any(path == d or (d.endswith("/") and path.startswith(d)) for d in deleted)
        }
        self.branches[revision] = self._enter({**kept, **changes}, message)
        return self.branches[revision]

    def open_pull_request(self) -> str:
        """Return a new branch, off the main one, as the Hub names them for pull requests."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.branches)
        self.branches[f"refs/pr/{number}"] = self.branches["main"]
        return f"refs/pr/{number}"

    def _enter(self, tree: Tree, message: str) -> str:
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(tree.items()))
        text = f"{self.name} {len(self.commits)} {message}\n{listing}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = tree
        self.messages.append(message)
        return sha


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def metadata_errors(card: str) -> list[str]:
    """Return what the Hub objects to in the metadata of a model card."""
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return []  # a warning on the Hub
    try:
        data = yaml.safe_load(match[2])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: not a mapping"]
    return [*_base_model_errors(data), *_list_errors(data), *_model_index_errors(data)]


def _base_model_errors(data: dict[str, Any]) -> list[str]:
    value = data.get("base_model")
    names = value if isinstance(value, list) else [value] * ("base_model" in data)
    return [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in names
        if not _is_id(name)
    ]


def _is_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def _list_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("tags", "datasets", "language"):
        values = data.get(key, [])
        for i, value in enumerate(values if isinstance(values, list) else [values]):
            if not isinstance(value, str) or not value:
                errors.append(f'"{key}[{i}]" must be a string')
    return errors


def _model_index_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    for i, model in enumerate(data.get("model-index", [])):
        place = f"model-index[{i}]"
        errors += _missing(model, place, name=str, results=list)
        for j, result in enumerate(model.get("results", [])):
            errors += _result_errors(result, f"{place}.results[{j}]")
    return errors


def _result_errors(result: dict[str, Any], place: str) -> list[str]:
    errors = _missing(result.get("task", {}), f"{place}.task", type=str)
    dataset = result.get("dataset", {})
    errors += _missing(dataset, f"{place}.dataset", type=str, name=str)
    kind = dataset.get("type", "-")
    if isinstance(kind, str) and not DATA_TYPE.fullmatch(kind):
        errors.append(
            f'"{place}.dataset.type" with value "{kind}" fails to match the required pattern'
        )
    errors += _missing(result, place, metrics=list)
    for i, metric in enumerate(result.get("metrics", [])):
        errors += _missing(metric, f"{place}.metrics[{i}]", type=str, value=object)
    return errors


def _missing(values: dict[str, Any], place: str, **kinds: type) -> list[str]:
    return [
        f'"{place}.{name}" is required and must be of type {kind.__name__}'
        for name, kind in kinds.items()
        if not isinstance(values.get(name), kind) or values.get(name) is None
    ]
