"""The benchmark task: adapt the embedded CLIP to a drawing style it has never seen, from few shots.

    from embedded.task import few_shot_task, features_of

    task = few_shot_task(seed=0, shots=16)
    before = task.score(*features_of(model, processor), split="test")
    ...                                          # train on task.train: images and labels
    after = task.score(*features_of(model, processor), split="test")
    after["base"] - before["base"]               # gain
    after["novel"] - before["novel"]             # transfer
    after["kept"] - before["kept"]               # what is kept

Half of the classes (emoji subcategories) are *base* classes, with a few training pictures in the
new style; the other half, the *novel* classes, are seen in no training picture. Class-balanced
accuracies in percent give three numbers:

- **base**: test pictures of base classes among the base classes' names; its rise is the *gain*;
- **novel**: test pictures of novel classes among the novel classes' names: the *transfer*;
- **kept**: the mean of zero-shot accuracies that have nothing to do with the new style: names (one
  of 1,636) and subcategories (one of all), in the styles of the pretraining and in the near one.

Pictures of one group (man, woman and person variants, for example) are never split over training,
validation and test. Settings are chosen on the validation split and reported on the test split.

The new style is `openmoji-negative`, chosen on the validation split before any method was compared,
because there full fine-tuning is seen to gain and to forget in every run. The model is too good at
plain `openmoji` and `emojione-v1` for that: full fine-tuning gains little or nothing on their base
classes and only forgets. Both stay available as `style`. `benchmarks/README.md` has the numbers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.pictures import (
    FAR,
    NEAR,
    NEGATIVE,
    SEEN,
    Style,
    all_emoji,
    load_style,
    subcategory_text,
)

ImageFeatures = Callable[[np.ndarray], Tensor]
TextFeatures = Callable[[list[str]], Tensor]

NEW_STYLE = FAR + NEGATIVE
TEMPLATE = "a picture of {}"
LEAST_GROUPS = 10  # a class needs these many groups to be split in three
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Labelled:
    """Pictures (N, 48, 48, 3) in uint8 and, for each, the index of its class."""

    images: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FewShotTask:
    """Everything a method may see in training, and what it is scored on."""

    style: str
    seed: int
    shots: int
    base_classes: tuple[str, ...]
    novel_classes: tuple[str, ...]
    train: Labelled
    validation_base: Labelled
    validation_novel: Labelled
    test_base: Labelled
    test_novel: Labelled

    def score(
        self, image_features: ImageFeatures, text_features: TextFeatures, split: str = "test"
    ) -> dict[str, float]:
        """Class-balanced accuracies in percent: base, novel, kept, and what kept is the mean of."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        scores = {}
        for kind, classes in (("base", self.base_classes), ("novel", self.novel_classes)):
            part: Labelled = getattr(self, f"{split}_{kind}")
            texts = text_features(prompts(classes))
            scores[kind] = accuracy(image_features(part.images), texts, part.labels)
        return {**scores, **kept_scores(image_features, text_features, split)}


def prompts(classes: Iterable[str]) -> list[str]:
    """The texts that stand for classes."""
    return [TEMPLATE.format(name) for name in classes]


@torch.no_grad()
def accuracy(images: Tensor, texts: Tensor, labels: Tensor) -> float:
    """Class-balanced accuracy in percent: the mean over classes of each class's own accuracy."""
    nearest = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    right = (nearest == labels).double()
    present, place = labels.unique(return_inverse=True)
    hits = torch.zeros(len(present), dtype=torch.double).index_add(0, place, right)
    return 100 * (hits / place.bincount()).mean().item()


def few_shot_task(seed: int = 0, shots: int = 16, style: str = NEW_STYLE) -> FewShotTask:
    """Draw classes and pictures for a seed; with fewer pictures than `shots`, a class gives all.

    Half of a class's groups are for training, a fifth for validation, the rest for testing. The
    split depends on the seed alone: more shots add training pictures and change nothing else.
    """
    if not 1 <= shots <= 16:
        raise ValueError(f"shots has to be between 1 and 16, got {shots}")
    pictures = load_style(style)
    rng = random.Random(seed)
    groups = groups_by_class(pictures)
    classes = sorted(name for name, found in groups.items() if len(found) >= LEAST_GROUPS)
    rng.shuffle(classes)
    half = len(classes) // 2
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)  # part -> (row, label)
    for kind, names in (("base", classes[:half]), ("novel", classes[half:])):
        for label, name in enumerate(names):
            order = [groups[name][key] for key in sorted(groups[name])]
            rng.shuffle(order)
            first, second = round(0.5 * len(order)), round(0.7 * len(order))
            if kind == "base":
                taken = spread(order[:first])[:shots]
                parts["train"] += [(row, label) for row in taken]
            for part, some in (("validation", order[first:second]), ("test", order[second:])):
                parts[f"{part}_{kind}"] += [(row, label) for rows in some for row in rows]
    texts = [subcategory_text(name) for name in classes]
    split = {part: labelled(pictures, pairs) for part, pairs in parts.items()}
    return FewShotTask(style, seed, shots, tuple(texts[:half]), tuple(texts[half:]), **split)


def groups_by_class(pictures: Style) -> dict[str, dict[str, list[int]]]:
    """`subcategory -> group -> rows`; a group that spans classes belongs to its first one alone."""
    home: dict[str, str] = {}
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, emoji in enumerate(pictures.emoji):
        if home.setdefault(emoji.group, emoji.subcategory) == emoji.subcategory:
            found[emoji.subcategory][emoji.group].append(row)
    return found


def spread(groups: list[list[int]]) -> list[int]:
    """Rows of all groups, one of each group before the second of any."""
    longest = max(map(len, groups))
    return [rows[i] for i in range(longest) for rows in groups if i < len(rows)]


def labelled(pictures: Style, pairs: list[tuple[int, int]]) -> Labelled:
    """Pictures by row with their labels."""
    rows, labels = zip(*pairs, strict=True)
    return Labelled(pictures.images[list(rows)], torch.tensor(labels))


@cache
def old_pictures(which: str, split: str, count: int = 500) -> tuple[np.ndarray, Tensor, Tensor]:
    """Some pictures of the old styles, with the indices of their names and of their subcategories.

    The same for every seed; validation and test share no emoji.
    """
    styles = [load_style(name) for name in (SEEN if which == "seen" else (NEAR,))]
    rows = [
        (style, row)
        for style in styles
        for row, emoji in enumerate(style.emoji)
        # By the emoji's group, so that the two splits are about different things.
        if (sum(emoji.group.encode()) % 2 == 0) == (split == "validation")
    ]
    chosen = random.Random(0).sample(rows, min(count, len(rows)))
    kinds = {name: i for i, name in enumerate(all_subcategories())}
    emoji = [style.emoji[row] for style, row in chosen]
    names, subcategories = [e.index for e in emoji], [kinds[e.subcategory] for e in emoji]
    images = np.stack([style.images[row] for style, row in chosen])
    return images, torch.tensor(names), torch.tensor(subcategories)


def all_subcategories() -> list[str]:
    """Every subcategory, in alphabetical order."""
    return sorted({emoji.subcategory for emoji in all_emoji()})


def kept_scores(
    image_features: ImageFeatures, text_features: TextFeatures, split: str
) -> dict[str, float]:
    """Zero-shot accuracies that adapting to a new style should leave alone, and their mean."""
    names = text_features(prompts(emoji.name for emoji in all_emoji()))
    kinds = text_features(prompts(map(subcategory_text, all_subcategories())))
    scores = {}
    for which in ("seen", "near"):
        images, by_name, by_kind = old_pictures(which, split)
        features = image_features(images)
        scores[f"{which} names"] = accuracy(features, names, by_name)
        scores[f"{which} subcategories"] = accuracy(features, kinds, by_kind)
    return {"kept": sum(scores.values()) / len(scores), **scores}


def pixel_values(images: np.ndarray) -> Tensor:
    """What the embedded CLIP's processor makes of 48-pixel pictures, without its overhead."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def features_of(model: torch.nn.Module, processor: object) -> tuple[ImageFeatures, TextFeatures]:
    """Image and text features of a `CLIPModel`, or of one wrapped by PEFT, without gradients."""

    @torch.no_grad()
    def image_features(images: np.ndarray) -> Tensor:
        batches = pixel_values(images).split(256)
        return torch.cat([model.get_image_features(pixel_values=b).pooler_output for b in batches])

    @torch.no_grad()
    def text_features(texts: list[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), 256):
            batch = processor(text=texts[start : start + 256], padding=True, return_tensors="pt")
            found.append(model.get_text_features(**batch).pooler_output)
        return torch.cat(found)

    return image_features, text_features
