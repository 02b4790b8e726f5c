"""Pictures with classes from folders, saved data sets, objects and the Hub, all in one form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from graftune.integrations.data import load_images, open_image
from support.dataset_hub import dataset_hub

COLOURS = ["red", "lime", "blue"]


def draw(folder: Path, count: int, colour: str = "red") -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (20, 30), colour).save(folder / f"{index}.PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes whose names could be mistaken for splits, and things that are no pictures."""
    draw(tmp_path / "train", 3, "red")
    draw(tmp_path / "test tube", 2, "blue")
    (tmp_path / "train" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / "._0.png").write_text("another program's")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".cache").mkdir()
    return tmp_path


def of_colours(labels: Any, image: str = "image", label: str = "label") -> datasets.Dataset:
    """A data set with the pictures inside, under column names of its own."""
    pictures = [Image.new("RGB", (4, 4), COLOURS[i % 3]) for i in range(len(labels))]
    return datasets.Dataset.from_dict({image: pictures, label: labels, "note": labels})


def test_subfolders_are_classes(folder: Path) -> None:
    data = load_images(folder)
    assert data.features["label"].names == ["test tube", "train"]
    assert list(data["label"]) == [0, 0, 1, 1, 1]
    assert open_image(data[4]["image"]).getpixel((0, 0)) == (255, 0, 0)
    assert data.cast_column("image", datasets.Image())[0]["image"].size == (20, 30)


def test_splits_are_subfolders_with_the_same_classes(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "b", 2)
    draw(tmp_path / "train" / "c", 1)
    draw(tmp_path / "val" / "a", 1)
    draw(tmp_path / "val" / "c" / "deeper", 1)
    train, validation = load_images(str(tmp_path)), load_images(tmp_path, split="val")
    assert train.features["label"].names == validation.features["label"].names == ["a", "b", "c"]
    assert (list(train["label"]), list(validation["label"])) == ([1, 1, 2], [0, 2])
    with pytest.raises(ValueError, match=r"split 'vall' is not .* only 'train', 'val'. Did you m"):
        load_images(tmp_path, split="vall")


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    draw(tmp_path / "train", 1)
    draw(tmp_path / "test", 1)
    data = load_images(tmp_path)
    assert data.features["label"].names == ["test", "train"]
    with pytest.raises(ValueError, match="split 'test' is not in the data, only 'train'"):
        load_images(tmp_path, split="test")


def test_a_folder_without_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere; give a fo"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no subfolders with pictures"):
        load_images(tmp_path)
    draw(tmp_path / "train" / "a", 1)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="test has no pictures, other splits"):
        load_images(tmp_path, split="test")


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets'.*pip install 'graftune\[train\]'"):
        load_images(folder)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a", "c", "a"], ["a", "b", "c"], [1, 0, 2, 0]),
        ([10, 2, 10, 7], ["2", "7", "10"], [2, 0, 2, 1]),
        ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
    ],
)
def test_any_labels_become_classes(labels: list, names: list[str], numbers: list[int]) -> None:
    data = load_images(of_colours(labels, "img", "kind"), image="img", label="kind")
    assert data.column_names == ["image", "label", "row"]
    assert data.features["label"].names == names
    assert list(data["label"]) == numbers
    assert open_image(data[2]["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_class_labels_stay_and_rows_count_in_the_source() -> None:
    feature = datasets.ClassLabel(names=["z", "y"])
    source = of_colours([1, 0, 1]).cast_column("label", feature).with_format("torch")
    data = load_images(source.select([2, 1])).select([1])
    assert data[0]["label"] == 0
    assert data[0]["row"] == 1
    assert data.features["label"] == feature


def test_columns_may_have_each_others_names() -> None:
    source = of_colours(["a", "b"], "label", "image")
    assert list(load_images(source, image="label", label="image")["label"]) == [0, 1]


def test_files_by_their_names(tmp_path: Path) -> None:
    draw(tmp_path / "pictures", 2, "blue")
    files = [str(tmp_path / "pictures" / f"{i}.PNG") for i in range(2)]
    data = load_images(datasets.Dataset.from_dict({"image": files, "label": ["a", "b"]}))
    assert open_image(data[1]["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_saved_data_sets(tmp_path: Path) -> None:
    source = of_colours(["a", "b"])
    source.save_to_disk(tmp_path / "one")
    parts = datasets.DatasetDict(train=source, test=source.select([1]))
    parts.save_to_disk(tmp_path / "parts")
    assert len(load_images(tmp_path / "one")) == 2
    for place in (str(tmp_path / "parts"), parts):
        assert list(load_images(place, split="test")["label"]) == [0]
        with pytest.raises(ValueError, match=r"split 'tset' is not .* Did you mean 'test'"):
            load_images(place, split="tset")


WRONG: dict[str, tuple[Any, dict[str, str], str]] = {
    "no image": (of_colours([1], "img"), {}, r"no column 'image' .*'img'.* mean 'img'.*image=\.\."),
    "no label": (
        of_colours([1]),
        {"label": "lable"},
        r"no column 'lable' .*mean 'label'.*label=\.\.",
    ),
    "not pictures": (
        of_colours([1]),
        {"image": "note"},
        "column 'note' holds .*int64.*not pictures",
    ),
    "pictures": (
        of_colours([1]).add_column("more", [b"x"]),
        {"image": "more", "label": "image"},
        "column 'image' holds Image.*not one class",
    ),
    "one column": (of_colours([1]), {"label": "image"}, "both column 'image'; they are two"),
    "numbers": (of_colours([0.5]), {}, "column 'label' holds .*float64.*not one class"),
    "several": (of_colours([[1, 2]]), {}, "column 'label' holds .*not one class"),
    "none": (of_colours([1, None]), {}, "column 'label' has no class in row 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_columns_are_named(what: str) -> None:
    source, options, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        load_images(source, **options)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="data of type int are not known; give a folder"):
        load_images(3)
    with pytest.raises(TypeError, match=r"IterableDataset.*load it without streaming"):
        load_images(of_colours([1]).to_iterable_dataset())
    with pytest.raises(FileNotFoundError, match="does not hold what is needed here"):
        load_images(__file__)


FROM_HUB = """
from graftune.integrations.data import load_images, load_texts, open_image
data = load_images("someone/colours", image="img", label="name", split="test")
print(data.features["label"].names, data["label"][:], open_image(data[0]["image"]).getpixel((0, 0)))
print(load_texts("someone/words", text="body")["text"][:])
for options in ({"source": "someone/nothing"}, {"source": "someone/colours", "split": "tset"}):
    try:
        load_images(**options)
    except (FileNotFoundError, ValueError) as error:
        print(error)
"""


def test_data_sets_of_the_hub(tmp_path: Path) -> None:
    of_colours(["r", "l"], "img", "name").to_parquet(tmp_path / "pictures")
    pictures = (tmp_path / "pictures").read_bytes()
    hub = {
        "someone/colours": {"data/train-0.parquet": pictures, "data/test-0.parquet": pictures},
        "someone/words": {"train.jsonl": b'{"body": "one"}\n{"body": "two"}\n'},
    }
    with dataset_hub(hub, tmp_path / "home") as environment:
        result = subprocess.run(
            [sys.executable, "-c", FROM_HUB],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    labels, texts, nothing, split = result.stdout.splitlines()
    assert labels == "['l', 'r'] [1, 0] (255, 0, 0)"
    assert texts == "['one', 'two']"
    assert "no file or folder someone/nothing; give a folder" in nothing
    assert "doesn't exist on the Hub" in nothing
    assert "tset" in split


def test_without_a_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"no file or folder some/thing; give .* be reached"):
        load_images("some/thing")
