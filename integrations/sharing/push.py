"""An adapter onto the Hub: its three files, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from graftune.adapters.base.folder import check_files, read_config, read_shapes
from graftune.adapters.base.messages import listing
from graftune.integrations.sharing.card import model_card
from graftune.integrations.sharing.fetch import CARD_NAME, one_line
from graftune.integrations.sharing.record import TrainingRecord


def push_to_hub(
    adapter: PeftModel | str | Path,
    repo_id: str,
    *,
    record: TrainingRecord | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish an adapter: config, tensors and model card, in one commit.

    The adapter is checked before the first request. Other files of the folder stay where they are,
    and so does the folder itself: the card is made on the way. Text and metadata that people wrote
    into the card, in the folder or on the Hub, are kept. The repository is made if need be.

    Args:
        adapter: the adapter's folder, or a PEFT model, of which the active adapter is published.
        repo_id: `owner/name`, or `name` for one of your own.
        record: how it was trained, for the card; None takes the record in the folder's card.
        private: whether a repository that is made now is private; None is the owner's default.
        token: the client's token; None takes the one that `hf auth login` has stored.
        revision: a branch, made if need be; None is the main one.
        commit_message: the commit's message.
        create_pr: open a pull request instead.

    Returns:
        The address of the repository, of its branch, or of the pull request.

    Raises:
        FileNotFoundError: the folder, or a file of it, is missing.
        ValueError: an empty, truncated or corrupt adapter, or a pickle; or the Hub does not accept
            the repository id, or the metadata that people wrote into the card.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refused, in one line.

    Example:
        >>> model.save_pretrained("outputs/adapter")
        >>> push_to_hub("outputs/adapter", "user/clip-emoji-flora")
        'https://huggingface.co/user/clip-emoji-flora'
    """
    with TemporaryDirectory() as temporary:
        folder = _folder(adapter, Path(temporary))
        check_publishable(folder)
        with _one_line_errors():
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            name = repository.repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(name, branch=revision, exist_ok=True)
            published = _published_card(api, name, revision)
            card = model_card(folder, record, repo_id=name, published=published)
            commit = api.create_commit(
                name,
                _operations(folder, card),
                commit_message=commit_message or "Upload adapter",
                revision=revision,
                create_pr=create_pr,
            )
    if commit.pr_url is not None:
        return commit.pr_url
    return str(repository) if revision is None else f"{repository}/tree/{revision}"


def check_publishable(folder: Path) -> None:
    """Check that a folder holds one complete adapter with numbers in it, and no pickle.

    Raises:
        FileNotFoundError: the folder, or a file of it, is missing.
        ValueError: what is there is no adapter to publish.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give what `save_pretrained` has made")
    check_files(folder)
    if (folder / WEIGHTS_NAME).exists():
        raise ValueError(
            f"{str(folder)!r} holds a pickle ({WEIGHTS_NAME}) beside {SAFETENSORS_WEIGHTS_NAME}: "
            "it is not clear which of them is the adapter. Delete the pickle."
        )
    read_config(folder)
    read_shapes(folder / SAFETENSORS_WEIGHTS_NAME)


def _folder(adapter: PeftModel | str | Path, temporary: Path) -> Path:
    """The adapter's folder; a model's is saved first."""
    if isinstance(adapter, (str, Path)):
        return Path(adapter)
    if not isinstance(adapter, PeftModel):
        raise TypeError(
            f"an adapter to publish is a folder or a PeftModel, got {type(adapter).__name__}"
        )
    names = adapter.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"the model has {len(names)} active adapters ({listing(names)}): activate the one to "
            "publish with `model.set_adapter(name)`, or save them and publish their folders"
        )
    adapter.save_pretrained(str(temporary), selected_adapters=names)
    return temporary if names[0] == "default" else temporary / names[0]


def _published_card(api: HfApi, name: str, revision: str | None) -> str | None:
    """The text of the model card that a repository has, or None when it has none."""
    try:
        path = api.hf_hub_download(name, CARD_NAME, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _operations(folder: Path, card: str) -> list[CommitOperationAdd]:
    files = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    return [
        *(CommitOperationAdd(name, str(folder / name)) for name in files),
        CommitOperationAdd(CARD_NAME, card.encode()),
    ]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Say what the client says, without its line breaks."""
    try:
        yield
    except HfHubHTTPError as error:
        raise type(error)(one_line(error), response=error.response) from error
    except ValueError as error:
        raise ValueError(one_line(error)) from error
