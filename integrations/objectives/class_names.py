"""Classification of images by the names of their classes, as CLIP does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from graftune.integrations.objectives import towers
from graftune.integrations.objectives.labels import (
    IGNORED,
    accuracies,
    check_labels,
    cross_entropy,
)


def clean_class_names(class_names: Sequence[str]) -> list[str]:
    """Return class names with underscores as spaces, after checking that each is there once.

    Raises:
        ValueError: no names, an empty name, or a name given twice.
        TypeError: one string instead of a list of them.
    """
    if isinstance(class_names, str):
        raise TypeError(f"class_names is the string {class_names!r}; give a list of names")
    names = [" ".join(str(name).replace("_", " ").split()) for name in class_names]
    if not names:
        raise ValueError("class_names is empty; give one name a class")
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ValueError(
            f"class_names[{empty[0]}] is {class_names[empty[0]]!r}: a name needs words"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"class_names has {', '.join(map(repr, twice[:5]))} more than once (underscores count "
            "as spaces); images of two classes with one name cannot be told apart"
        )
    return names


def clean_templates(template: str | Sequence[str]) -> list[str]:
    """Return the templates as a list, after checking that each has a place for the name.

    Raises:
        ValueError: no templates, or one without exactly one `{}`.
    """
    templates = [template] if isinstance(template, str) else list(template)
    if not templates:
        raise ValueError("template is empty; give at least one text with {} for the class name")
    for text in templates:
        if text.count("{}") != 1:
            raise ValueError(
                f"template {text!r} needs exactly one {{}} for the class name, as in "
                "'a photo of a {}.'"
            )
    return templates


class ClassNameClassifier(nn.Module):
    """Classify images by the likeness of their features to those of the classes' names.

    logits[i, c] = exp(s) · ⟨f(imageᵢ), g(text_c)⟩ + b and loss = mean over i of
    −log softmax(logits[i])[labelᵢ], with the model's own features f and g of length one, scale s
    and bias b (CLIP, arXiv 2103.00020, section 3.1): with one template the logits are the model's
    own `logits_per_image`. With several, g(text_c) is the mean of the templates' features, scaled
    to length one. It owns no weights, and calls the model once, on all images and texts together.

    Args:
        class_names: C different names in the order of the labels; underscores count as spaces.
        tokenizer: the model's transformers tokenizer or processor, or its open_clip tokenizer.
        template: one text, or several, each with `{}` where the class name goes.

    Raises:
        ValueError: empty or repeated class names, a template without `{}`; when called, labels out
            of range or a text that is longer than the model takes.
        TypeError: when called, a model without an image and a text tower.

    Example:
        >>> objective = ClassNameClassifier(["cat", "dog"], processor)
        >>> objective(model, pixel_values=pixels, labels=labels)["loss"].backward()
        >>> other = objective.with_class_names(["red panda", "raccoon"])
    """

    def __init__(
        self,
        class_names: Sequence[str],
        tokenizer: Callable[..., Any],
        template: str | Sequence[str] = "a photo of a {}.",
    ) -> None:
        super().__init__()
        self.class_names = clean_class_names(class_names)
        self.templates = clean_templates(template)
        self.tokenizer = tokenizer
        self._tokens: dict[str, torch.Tensor] = {}

    def with_class_names(
        self, class_names: Sequence[str], template: str | Sequence[str] | None = None
    ) -> ClassNameClassifier:
        """Return a classifier for other classes, by the same templates unless others are given."""
        return type(self)(class_names, self.tokenizer, template or self.templates)

    def texts(self) -> list[str]:
        """Return every class name in every template, template by template: T·C texts."""
        return [text.replace("{}", name) for text in self.templates for name in self.class_names]

    def tokens(self, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the tokens of `texts()` on a device; they are computed at the first call."""
        if not self._tokens:
            self._tokens = towers.tokenize(model, self.tokenizer, self.texts())
        self._tokens = {name: tensor.to(device) for name, tensor in self._tokens.items()}
        return self._tokens

    def forward(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        class_features: torch.Tensor | None = None,
        features: bool = False,
    ) -> dict[str, Any]:
        """Return logits (B, C), with labels the loss and the mask (B,), and features if asked for.

        Args:
            model: the model with two towers, as it comes from DDP, FSDP, torch.compile or PEFT.
            pixel_values: preprocessed images, (B, channels, height, width).
            labels: (B,) in 0..C-1; -100 is left out of the loss.
            num_items_in_batch: by what the summed loss is divided: the number of labels over all
                accumulated batches and processes. Default: the number of labels in this batch.
            class_features: what `class_features(model)` returned, to leave out the text tower at
                inference; it holds as long as neither the classes nor the model's weights change.
            features: return the features as well, of length one: "image" (B, D) and "text"
                (T·C, D) in the order of `texts()`, or the class features where these were given.
        """
        result: dict[str, Any]
        if class_features is None:
            tokens = self.tokens(model, pixel_values.device)
            output = towers.joint_forward(model, tokens, pixel_values)
            images, texts = output.image_features, output.text_features
            result = {"logits": self._class_logits(output)}
        else:
            images, texts = towers.encode_images(model, pixel_values), class_features
            result = {"logits": towers.logits_of(model, images, texts)}
        if features:
            result["features"] = {"image": images, "text": texts}
        if labels is not None:
            self._check_labels(labels)
            result |= cross_entropy(result["logits"], labels, num_items_in_batch)
        return result

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of labels in a batch."""
        return (batch["labels"] != IGNORED).sum()

    @torch.no_grad()
    def class_features(self, model: nn.Module) -> torch.Tensor:
        """Return the features of the classes, of length one: (C, D).

        Example:
            >>> features = objective.class_features(model)
            >>> logits = objective(model, pixels, class_features=features)["logits"]
        """
        tokens = self.tokens(model, next(model.parameters()).device)
        features = towers.encode_texts(model, tokens)
        means = features.unflatten(0, (len(self.templates), -1)).mean(0)  # (C, D)
        return F.normalize(means, dim=-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and class-balanced accuracy of logits (N, C) against labels (N,)."""
        return accuracies(predictions, labels)

    def _class_logits(self, output: towers.JointOutput) -> torch.Tensor:
        if len(self.templates) == 1:
            return output.logits
        # The logits are linear in the text features: their mean over templates belongs to the mean
        # feature, and only has to be divided by that feature's length.
        shape = (len(self.templates), len(self.class_names))
        lengths = output.text_features.unflatten(0, shape).mean(0).norm(dim=-1)  # (C,)
        bias = 0 if output.logit_bias is None else output.logit_bias
        means = (output.logits - bias).unflatten(1, shape).mean(1)  # (B, C)
        return means / lengths + bias

    def _check_labels(self, labels: torch.Tensor) -> None:
        count = len(self.class_names)
        there_are = f"there are {count} class names"
        check_labels(labels, count, there_are, "give class_names in the order of the labels")
