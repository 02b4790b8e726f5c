"""What a local Hub answers: one function a call of the client, without HTTP."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from support.hub_store import Blob, Repository, is_large, metadata_errors

REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Answer:
    """What is sent back: JSON, or bytes, or nothing but headers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An answer other than success: status, the Hub's code for it, and its message."""

    def __init__(
        self, status: int, code: str, message: str, commit: str | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.commit, self.body = commit, body

    def answer(self) -> Answer:
        headers = {
            "X-Error-Message": self.message.replace("\n", " "),
            "X-Error-Code": self.code,
            "X-Repo-Commit": self.commit,
        }
        given = {name: value for name, value in headers.items() if value}
        return Answer({"error": self.message, **self.body}, self.status, given)


@dataclass
class Request:
    """What has come in, and who sent it."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    user: str | None
    authorized: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, path: str) -> Callable[[Route], Route]:
    def enter(function: Route) -> Route:
        ROUTES.append((method, re.compile(path), function))
        return function

    return enter


class Hub:
    """The state of a local Hub.

    Args:
        tokens: the user of each token that is known.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = ""
        self.storage = ""

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables that send a client here, with a cache of its own."""
        environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }
        return environment

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files that a repository has, without the Hub's own `.gitattributes`."""
        tree = self.repositories[name].tree(revision)
        return {path: blob.content for path, blob in tree.items() if path != ".gitattributes"}

    def readable(self, request: Request, name: str) -> Repository:
        repository = self.repositories.get(name)
        if repository and (not repository.private or request.user == name.partition("/")[0]):
            return repository
        if request.user is None:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        raise Refused(404, "RepoNotFound", "Repository not found")

    def writable(self, request: Request, name: str) -> Repository:
        self.check_owner(request, name)
        return self.readable(request, name)

    def check_owner(self, request: Request, name: str) -> None:
        if request.user is None:
            raise Refused(401, "", "Invalid username or password.")
        if request.user != name.partition("/")[0]:
            raise Refused(403, "", f"You don't have the rights to write to {name}")

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Answer:
    asked = request.json
    name = f"{asked['organization'] or request.user}/{asked['name']}"
    hub.check_owner(request, name)
    url = f"{hub.endpoint}/{name}"
    if name in hub.repositories:
        raise Refused(409, "", "You already created this model repo", url=url, name=name)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.repositories[name] = Repository(name, private)
    return Answer({"url": url, "name": name})


@route("POST", "/api/validate-yaml")
def validate(hub: Hub, request: Request) -> Answer:
    errors = [{"message": message} for message in metadata_errors(request.json["content"])]
    return Answer({"errors": errors, "warnings": []}, status=400 if errors else 200)


@route("POST", f"/api/models/{REPOSITORY}/branch/{REVISION}")
def branch(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = hub.writable(request, name)
    if revision in repository.branches:
        raise Refused(409, "", "Reference already exists")
    start = request.json.get("startingPoint", "main")
    repository.branches[revision] = hub.revision(repository, start)
    return Answer({})


@route("POST", f"/api/models/{REPOSITORY}/preupload/{REVISION}")
def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = hub.readable(request, name)
    tree = repository.commits[hub.revision(repository, revision)]
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
            "shouldIgnore": False,
            "oid": tree[file["path"]].oid if file["path"] in tree else None,
        }
        for file in request.json["files"]
    ]
    return Answer({"files": files})


@route("POST", f"/{REPOSITORY}[.]git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, name: str) -> Answer:
    hub.writable(request, name)
    objects = []
    for entry in request.json["objects"]:
        if entry["oid"] not in hub.objects:
            verify = {"href": f"{hub.endpoint}/api/models/{name}/lfs-verify"}
            upload = {"href": f"{hub.storage}/objects/{entry['oid']}"}
            entry = {**entry, "actions": {"upload": upload, "verify": verify}}
        objects.append(entry)
    return Answer({"transfer": "basic", "objects": objects})


@route("POST", f"/api/models/{REPOSITORY}/lfs-verify")
def lfs_verify(hub: Hub, request: Request, name: str) -> Answer:
    content = hub.objects.get(request.json["oid"])
    if content is None or len(content) != request.json["size"]:
        raise Refused(404, "", "the object is not in the storage")
    return Answer({})


@route("POST", f"/api/models/{REPOSITORY}/commit/{REVISION}")
def commit(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    opens = request.query.get("create_pr") == ["1"]
    repository = hub.readable(request, name) if opens else hub.writable(request, name)
    hub.revision(repository, revision)
    changes: dict[str, Blob] = {}
    deleted: list[str] = []
    message = ""
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
        elif entry["key"] == "file":
            changes[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
        elif entry["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                raise Refused(400, "", f"{value['path']} was not uploaded")
            changes[value["path"]] = Blob(hub.objects[value["oid"]], large=True)
        else:
            deleted.append(value["path"] + "/" * (entry["key"] == "deletedFolder"))
    card = changes.get("README.md")
    if card is not None and metadata_errors(card.content.decode()):
        raise Refused(400, "", "\n".join(metadata_errors(card.content.decode())))
    target = repository.open_pull_request() if opens else revision
    sha = repository.commit(target, changes, deleted, message)
    url = f"{hub.endpoint}/{name}"
    number = target.rpartition("/")[2]
    pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if opens else {}
    return Answer({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, **pull_request})


@route("GET", f"/api/models/{REPOSITORY}(/revision/{REVISION})?")
def info(hub: Hub, request: Request, name: str, revision: str | None) -> Answer:
    repository = hub.readable(request, name)
    sha = hub.revision(repository, revision or "main")
    siblings = [{"rfilename": path} for path in repository.commits[sha]]
    return Answer({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})


@route("GET", f"/api/models/{REPOSITORY}/tree/{REVISION}")
def tree(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = hub.readable(request, name)
    files = repository.commits[hub.revision(repository, revision)]
    return Answer(
        [
            {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
            for path, blob in files.items()
        ]
    )


@route("HEAD|GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    repository = hub.readable(request, name)
    sha = hub.revision(repository, revision)
    blob = repository.commits[sha].get(path)
    if blob is None:
        raise Refused(404, "EntryNotFound", "Entry not found", commit=sha)
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"'}
    if not blob.large:
        return Answer(blob.content, headers=headers)
    headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
    return Answer(b"", 302, {**headers, "Location": f"{hub.storage}/objects/{blob.oid}"})


def answer(hub: Hub, request: Request) -> Answer:
    """The Hub's answer to a request."""
    if request.authorized and request.user is None:
        raise Refused(401, "", "Invalid credentials in Authorization header")
    for method, pattern, function in ROUTES:
        match = pattern.fullmatch(request.path)
        if match and request.method in method.split("|"):
            values = {k: v and unquote(v) for k, v in match.groupdict().items()}
            return function(hub, request, **values)
    raise Refused(404, "", f"{request.method} {request.path} is not known here")


def store(hub: Hub, request: Request) -> Answer:
    """The storage host's answer: it knows no users, and takes only what is signed for."""
    if request.authorized:
        raise Refused(400, "", "a token was sent to the storage host")
    oid = request.path.rpartition("/")[2]
    if request.method == "PUT":
        if Blob(request.body, large=True).oid != oid:
            raise Refused(400, "", "the content is not what was announced")
        hub.objects[oid] = request.body
        return Answer(b"")
    return Answer(hub.objects[oid])
