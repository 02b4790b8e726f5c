"""`graftune push`: an adapter onto the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftune.cli.options import option
from graftune.cli.parsing import OptionParser
from graftune.integrations.sharing import push_to_hub


@dataclass
class PushOptions:
    """What `graftune push` takes beside the adapter and the repository."""

    private: bool | None = option(
        None, "Whether a repository that is made now is private. None: the owner's default."
    )
    branch: str | None = option(None, "Branch, made if need be. None: the main one.")
    message: str | None = option(None, "Message of the commit. None: Upload adapter.")
    create_pr: bool = option(False, "Open a pull request instead.")


def run(arguments: Sequence[str]) -> None:
    """Publish an adapter, with the token that `hf auth login` or HF_TOKEN holds."""
    parser = OptionParser(
        "push",
        "publish an adapter on the Hub, with the token that `hf auth login` or HF_TOKEN holds",
        [PushOptions],
    )
    parser.add_argument("adapter", help="the adapter's folder")
    parser.add_argument("repository", help="owner/name, or name for one of your own")
    options, given = parser.parse(arguments)
    address = push_to_hub(
        given.adapter,
        given.repository,
        private=options.private,
        revision=options.branch,
        commit_message=options.message,
        create_pr=options.create_pr,
    )
    print(address)
