"""Save, push and load by repository id, through the real client against a local Hub.

`support.hub_server` says what of that is real and what is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import graftune
from graftune.integrations.sharing import TrainingRecord, push_to_hub, read_record
from support import hub_client as steps
from support.hub_api import Hub
from support.hub_client import CASE, fresh_process
from support.hub_server import local_hub

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
BASE = "user/tiny-llama"
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with local_hub({"a-token": "user"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    CASE.build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def author(hub: Hub, base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """A process of the user who publishes, with a base model on the Hub."""
    home = tmp_path_factory.mktemp("author")
    with fresh_process(hub.environment(home, token="a-token")) as call:
        call(steps.upload_folder, base_folder, BASE)
        yield call


@pytest.fixture(scope="module")
def expected(author: Call, adapter: Path) -> list[Any]:
    """What the trained model answered before it was saved."""
    return json.loads((adapter.parent / "answers.json").read_text())


@pytest.fixture(scope="module")
def adapter(author: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter on the base model of the Hub."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    answers = author(steps.train_and_save, BASE, str(folder))
    (folder.parent / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture(scope="module")
def published(author: Call, adapter: Path) -> str:
    record = TrainingRecord("flora", seed=3, metrics={"held-out": {"accuracy": 0.5}})
    author(steps.push, str(adapter), "user/adapter", record=record)
    return "user/adapter"


@pytest.fixture(scope="module")
def newcomer(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """A process of somebody else: no token, an empty cache, nothing imported."""
    with fresh_process(hub.environment(tmp_path_factory.mktemp("stranger"))) as call:
        yield call


@pytest.fixture(scope="module")
def code(hub: Hub, published: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card(hub, published).text, re.DOTALL)
    return code


@pytest.fixture(scope="module")
def answers_by_code(newcomer: Call, code: str) -> list[Any]:
    return newcomer(steps.answers_by_code, code)


@pytest.fixture(scope="module")
def stranger(newcomer: Call, answers_by_code: list[Any]) -> Call:
    """The same process, once the code in the card has run in it."""
    return newcomer


def card(hub: Hub, repository: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repository, revision)["README.md"].decode())


def test_the_code_in_the_card_loads_the_adapter(
    code: str, answers_by_code: list[Any], expected: list[Any]
) -> None:
    assert code.splitlines()[0] == "import graftune"
    assert len(code.splitlines()) == 3
    assert answers_by_code == expected


def test_loading_by_id_answers_bit_for_bit_as_before(
    published: str, stranger: Call, expected: list[Any]
) -> None:
    assert stranger(steps.answers, published) == expected
    assert stranger(steps.answers_by_peft, published) == expected


def test_three_files_are_published_in_one_commit(hub: Hub, published: str, adapter: Path) -> None:
    files = hub.files(published)
    assert sorted(files) == FILES
    for name in FILES[1:]:
        assert files[name] == (adapter / name).read_bytes()
    assert hub.repositories[published].messages == ["initial commit", "Upload adapter"]


def test_the_card_names_the_base_and_holds_the_record(
    hub: Hub, published: str, tmp_path: Path
) -> None:
    data = card(hub, published).data
    assert data.base_model == BASE
    assert data.library_name == "peft"
    assert {"graftune", "flora", f"base_model:adapter:{BASE}"} <= set(data.tags)
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [("held-out", 0.5)]
    (tmp_path / "README.md").write_bytes(hub.files(published)["README.md"])
    record = read_record(tmp_path)
    assert record is not None
    assert (record.seed, record.versions["graftune"]) == (3, graftune.__version__)


def test_a_branch(
    hub: Hub, author: Call, published: str, stranger: Call, expected: list[Any]
) -> None:
    url = author(steps.train_and_push, BASE, published, seed=2, revision="second")
    assert url == f"{hub.endpoint}/{published}/tree/second"
    second = stranger(steps.answers, published, revision="second")
    assert second != expected
    assert stranger(steps.answers_by_peft, published, revision="second") == second
    assert stranger(steps.answers, published) == expected


def test_a_pull_request_leaves_the_main_branch(hub: Hub, author: Call, published: str) -> None:
    before = hub.files(published)
    url = author(steps.train_and_push, BASE, published, seed=4, create_pr=True)
    assert url == f"{hub.endpoint}/{published}/discussions/1"
    assert hub.files(published) == before
    assert hub.files(published, "refs/pr/1") != before


def test_pushing_the_same_again_makes_no_commit(
    hub: Hub, author: Call, published: str, adapter: Path
) -> None:
    record = TrainingRecord("flora", seed=5)
    author(steps.push, str(adapter), "user/again", record=record)
    before = list(hub.repositories["user/again"].messages)
    url = author(steps.push, str(adapter), "user/again", record=record)
    assert url == f"{hub.endpoint}/user/again"
    assert hub.repositories["user/again"].messages == before


def test_a_name_alone_is_a_repository_of_ones_own(hub: Hub, author: Call, adapter: Path) -> None:
    assert author(steps.push, str(adapter), "mine") == f"{hub.endpoint}/user/mine"
    assert '"user/mine"' in card(hub, "user/mine").text


def test_a_named_adapter_of_a_model(
    hub: Hub, author: Call, stranger: Call, expected: list[Any]
) -> None:
    author(steps.train_and_push, BASE, "user/named", adapter_name="style")
    assert sorted(hub.files("user/named")) == FILES
    assert stranger(steps.answers, "user/named") == expected


def test_the_push_of_peft_and_a_subfolder(
    hub: Hub, author: Call, stranger: Call, expected: list[Any]
) -> None:
    author(steps.push_by_peft, BASE, "user/by-peft")
    assert stranger(steps.answers, "user/by-peft") == expected
    author(steps.push_by_peft, BASE, "user/styles", adapter_name="style")
    assert "style/adapter_config.json" in hub.files("user/styles")
    assert stranger(steps.answers, "user/styles", subfolder="style") == expected
    kinds, message = stranger(steps.attempt, steps.answers, "user/styles")
    assert "FileNotFoundError" in kinds
    assert "adapter_config.json" in message


def test_the_push_of_peft_keeps_the_card_that_is_there(
    hub: Hub, author: Call, adapter: Path
) -> None:
    author(steps.push, str(adapter), "user/both")
    before = hub.files("user/both")
    author(steps.push_by_peft, BASE, "user/both", seed=9)
    after = hub.files("user/both")
    assert after["README.md"] == before["README.md"]
    assert after[FILES[2]] != before[FILES[2]]


def test_a_base_that_is_a_local_path(
    hub: Hub, author: Call, base_folder: str, stranger: Call, expected: list[Any]
) -> None:
    author(steps.train_and_push, base_folder, "user/local-base")
    published = card(hub, "user/local-base")
    assert published.data.base_model is None
    assert not any("base_model" in tag for tag in published.data.tags)
    assert len(re.findall("<!-- base_model is left out: .* -->", published.text)) == 1
    assert stranger(steps.answers, "user/local-base") == expected


def test_the_push_of_the_trainer_with_such_a_base(
    hub: Hub, author: Call, base_folder: str, stranger: Call, tmp_path: Path
) -> None:
    author(steps.push_by_trainer, base_folder, "user/by-trainer", str(tmp_path / "run"))
    published = card(hub, "user/by-trainer")
    assert published.data.base_model is None
    assert published.text.split("```python\n")[1].startswith("import graftune\n")
    assert "learning_rate" in published.text  # transformers' own part is kept
    assert not [name for name in hub.files("user/by-trainer") if name.endswith(".bin")]
    stranger(steps.answers, "user/by-trainer")


def test_the_local_hub_refuses_a_base_that_is_a_path(author: Call, tmp_path: Path) -> None:
    """So the test above would see it."""
    (tmp_path / "README.md").write_text("---\nbase_model: /data/llama\n---\n")
    kinds, message = author(steps.attempt, steps.upload_folder, str(tmp_path), "user/wrong")
    assert "ValueError" in kinds
    assert "/data/llama" in message


def test_words_written_on_the_hub_stay(
    hub: Hub, author: Call, adapter: Path, tmp_path: Path
) -> None:
    author(steps.push, str(adapter), "user/edited", record=TrainingRecord("flora", seed=1))
    edited = card(hub, "user/edited")
    edited.data.license = "mit"
    edited.data.tags = [*edited.data.tags, "emoji"]
    edited.text = f"{edited.text}\n## Limits\n\nIt has never seen a cat.\n"
    edited.save(tmp_path / "README.md")
    author(steps.upload_folder, str(tmp_path), "user/edited")
    author(steps.train_and_push, BASE, "user/edited", seed=2)
    after = card(hub, "user/edited")
    assert after.data.license == "mit"
    assert "emoji" in after.data.tags
    assert "graftune" not in after.data  # the record of other weights
    assert after.text.count("It has never seen a cat.") == 1
    assert after.text.count("## Loading it") == 1


def hollow(folder: Path) -> None:
    tensors = load_file(folder / FILES[2])
    save_file({name: torch.empty(0) for name in tensors}, folder / FILES[2])


def truncate(folder: Path) -> None:
    content = (folder / FILES[2]).read_bytes()
    (folder / FILES[2]).write_bytes(content[: len(content) // 2])


def put_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / FILES[2]), folder / "adapter_model.bin")


def pickle_only(folder: Path) -> None:
    put_a_pickle(folder)
    (folder / FILES[2]).unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (hollow, "ValueError", "empty adapter"),
        (truncate, "ValueError", "truncated or corrupt"),
        (put_a_pickle, "ValueError", "pickle"),
        (pickle_only, "ValueError", "pickle"),
        (lambda folder: (folder / FILES[1]).unlink(), "FileNotFoundError", FILES[1]),
        (lambda folder: (folder / FILES[2]).unlink(), "FileNotFoundError", FILES[2]),
        (lambda folder: folder.rename(folder.parent / "away"), "FileNotFoundError", "no folder"),
    ],
)
def test_what_is_no_adapter_is_refused_before_any_request(
    hub: Hub,
    author: Call,
    adapter: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    kind: str,
    words: str,
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((adapter / name).read_bytes())
    spoil(folder)
    seen = len(hub.requests)
    kinds, message = author(steps.attempt, steps.push, str(folder), "user/refused")
    assert kind in kinds
    assert words in message
    assert hub.requests[seen:] == []


def test_a_private_repository_needs_a_token(
    author: Call, adapter: Path, stranger: Call, expected: list[Any]
) -> None:
    author(steps.push, str(adapter), "user/secret", private=True)
    kinds, message = stranger(steps.attempt, steps.answers, "user/secret")
    assert "FileNotFoundError" in kinds
    assert "make sure you are authenticated" in message
    assert "\n" not in message
    assert stranger(steps.answers, "user/secret", token="a-token") == expected


def test_a_missing_revision_is_one_line(published: str, stranger: Call) -> None:
    kinds, message = stranger(steps.attempt, steps.answers, published, revision="nowhere")
    assert "FileNotFoundError" in kinds
    assert "Invalid rev id: nowhere" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("repository", "token", "words"),
    [
        ("user/adapter", False, "401"),
        ("user/adapter", "no-such-token", "Invalid credentials"),
        ("somebody/adapter", None, "403"),
    ],
)
def test_a_refused_push_is_one_line_of_the_client(
    author: Call, adapter: Path, repository: str, token: Any, words: str
) -> None:
    kinds, message = author(steps.attempt, steps.push, str(adapter), f"{repository}-2", token=token)
    assert "HfHubHTTPError" in kinds
    assert words in message
    assert "\n" not in message


def test_metadata_that_the_hub_refuses_commit_nothing(
    hub: Hub, author: Call, adapter: Path, tmp_path: Path
) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(text.replace("---\n", "---\ndatasets: [3]\n", 1))
    kinds, message = author(steps.attempt, steps.push, str(tmp_path), "user/invalid")
    assert "ValueError" in kinds
    assert "datasets" in message
    assert "\n" not in message
    assert hub.files("user/invalid") == {}


def test_what_cannot_be_pushed_is_said() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        push_to_hub(CASE.build(), "user/adapter")  # type: ignore[arg-type]
    model = graftune.wrap(CASE.build(), "flora", r=2)
    graftune.wrap(model, "flora", adapter_name="second", r=2)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        push_to_hub(model, "user/adapter")
