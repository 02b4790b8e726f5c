"""Few examples, parts of the classes and held-out rows: what they promise, whatever the data."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftune.integrations.data import (
    Selection,
    few_shot,
    hold_out,
    select_classes,
    split_classes,
)

labels_of_classes = st.lists(st.integers(0, 4), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)
names_of_classes = st.lists(st.text(min_size=1), min_size=2, max_size=12, unique=True)


def labelled(labels: list[int], names: str = "abcde") -> datasets.Dataset:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(names)),
            "row": datasets.Value("int64"),
        }
    )
    columns = {"text": [f"{i}" for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict({**columns, "row": range(len(labels))}, features=features)


@given(labels=labels_of_classes, seed=seeds, data=st.data())
def test_few_shot_chooses_each_class_alike(labels: list, seed: int, data: st.DataObject) -> None:
    shots = data.draw(st.integers(1, min(Counter(labels).values())))
    chosen, rest = few_shot(labels, shots, seed)
    assert Counter(labels[i] for i in chosen) == dict.fromkeys(labels, shots)
    assert sorted(chosen + rest) == list(range(len(labels)))
    assert (chosen, rest) == (sorted(chosen), sorted(rest))
    assert few_shot(np.array(labels), shots, seed) == (chosen, rest)


def test_another_seed_chooses_others() -> None:
    labels = [0, 1, 2] * 10
    assert few_shot(labels, shots=4, seed=1) != few_shot(labels, shots=4, seed=2)


def test_few_shot_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="class 1 has 1 examples, fewer than shots = 2"):
        few_shot([0, 0, 1], shots=2, seed=0)
    with pytest.raises(ValueError, match="shots is 0"):
        few_shot([0, 0, 1], shots=0, seed=0)


@given(names=names_of_classes, seed=st.none() | seeds, data=st.data())
def test_parts_of_the_classes(names: list, seed: int | None, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, len(names)))
    parts = split_classes(names, seed, count)
    sizes = [len(part) for part in parts]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert all(part == sorted(part, key=names.index) for part in parts)
    assert split_classes(names, seed, count) == parts
    if seed is None:
        assert [name for part in parts for name in part] == names


def test_a_seed_mixes_the_classes() -> None:
    names = list("abcdefgh")
    assert split_classes(names) == [list("abcd"), list("efgh")]
    assert len({str(split_classes(names, seed)) for seed in range(10)}) > 5


def test_splits_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ValueError, match="parts is 3; it must be 2 to the number of class names, 2"
    ):
        split_classes(["a", "b"], parts=3)
    with pytest.raises(ValueError, match="given more than once: 'a'"):
        split_classes(["a", "b", "a"])


def test_classes_are_numbered_anew() -> None:
    data = labelled([0, 1, 2, 3, 4, 3, 1])
    chosen = select_classes(data, ["d", "b"])
    assert chosen.column_names == data.column_names
    assert chosen.features["label"].names == ["d", "b"]
    assert chosen["label"][:] == [1, 0, 0, 1]
    assert chosen["row"][:] == [1, 3, 5, 6]
    assert data["label"][:] == [0, 1, 2, 3, 4, 3, 1]
    again = select_classes(chosen.with_format("torch"), ["b"])
    assert (again["label"][:].tolist(), again["row"][:].tolist()) == ([0, 0], [1, 6])


def test_unlabelled_rows_belong_to_no_class() -> None:
    assert select_classes(labelled([-1, 4]), ["e"])["row"][:] == [1]


def test_unknown_classes_are_named() -> None:
    data = labelled([0, 1], names="ab")
    with pytest.raises(ValueError, match=r"no class 'bb' .* are 'a', 'b'. Did you mean 'b'"):
        select_classes(data, ["bb"])
    with pytest.raises(ValueError, match="no class names are given"):
        select_classes(data, [])
    with pytest.raises(ValueError, match="more than once: 'a'"):
        select_classes(data, ["a", "a"])


@given(labels=labels_of_classes, seed=seeds, share=st.floats(0.01, 0.99))
def test_every_class_is_on_both_sides(labels: list, seed: int, share: float) -> None:
    labels = labels + labels
    train, held = hold_out(labelled(labels), share, seed)
    assert sorted([*train["row"], *held["row"]]) == list(range(len(labels)))
    for label, count in Counter(labels).items():
        part = Counter(held["label"])[label]
        assert 1 <= part <= count - 1
        assert abs(part - share * count) < 1


def test_what_has_no_classes_is_one_class() -> None:
    data = labelled([0] * 20).remove_columns("label")
    train, held = hold_out(data, 0.25, seed=3)
    assert (len(train), len(held)) == (15, 5)
    assert held["row"][:] == hold_out(data, 0.25, seed=3)[1]["row"][:]
    assert held["row"][:] != hold_out(data, 0.25, seed=4)[1]["row"][:]


def test_what_cannot_be_held_out_is_named() -> None:
    with pytest.raises(ValueError, match="share is 1; it must be between 0 and 1"):
        hold_out(labelled([0, 0]), 1, seed=0)
    with pytest.raises(ValueError, match="class 1 has one row, none of which can be held out"):
        hold_out(labelled([0, 0, 1]), 0.5, seed=0)
    with pytest.raises(ValueError, match="the data have no rows"):
        hold_out(labelled([]), 0.5, seed=0)


def recorded(seed: int) -> Selection:
    rows, _ = few_shot([i % 7 for i in range(700)], shots=5, seed=seed)
    return Selection.of(rows, "flowers", "train", seed, 5, ["a", "b"])


def test_the_same_seed_is_the_same_digest_in_another_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(recorded, 3).result()
    here = recorded(3)
    assert here == there
    assert here.digest != recorded(4).digest
    assert json.loads(json.dumps(dataclasses.asdict(here))) == {
        "source": "flowers",
        "split": "train",
        "seed": 3,
        "shots": 5,
        "class_names": ["a", "b"],
        "rows": 35,
        "digest": there.digest,
    }


def test_a_selection_is_of_rows_in_any_order() -> None:
    one = Selection.of([5, 1], "words.jsonl")
    assert one == Selection.of(np.array([1, 5]), "words.jsonl")
    assert one.digest != Selection.of([1, 6], "words.jsonl").digest
    # printf '\\1\\0\\0\\0\\0\\0\\0\\0\\5\\0\\0\\0\\0\\0\\0\\0' | sha256sum
    assert one.digest == "e716a168cd65de1488a49d997610a642f97d64f655d2ca95d15c89ae0b4dc358"
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 1  # type: ignore[misc]
