"""Classification of images by the names of their classes, as CLIP does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from graftune.adapters.base.feature_cache import FeatureCache, frozen_state
from graftune.integrations.libraries import towers
from graftune.integrations.objectives.class_cache import is_whole, state_of
from graftune.integrations.objectives.labels import (
    IGNORED,
    accuracies,
    check_labels,
    cross_entropy,
)
from graftune.integrations.objectives.names import clean_class_names, clean_templates
from graftune.integrations.objectives.prompted_texts import check_names_are_left
from graftune.integrations.objectives.unwrap import base_of


class ClassNameClassifier(nn.Module):
    """Classify images by the likeness of their features to those of the classes' names.

    logits[i, c] = exp(s) · ⟨f(imageᵢ), g(text_c)⟩ + b and loss = mean over i of
    −log softmax(logits[i])[labelᵢ], with the model's own features f and g of length one, scale s
    and bias b (CLIP, arXiv 2103.00020, section 3.1): with one template the logits are the model's
    own `logits_per_image`. With several, g(text_c) is the mean of the templates' features, scaled
    to length one. It owns no weights, and calls the model once, on all images and texts together.
    In evaluation, and for the frozen model, the classes' features are computed once and kept until
    the adapter, its state or the classes change.

    Args:
        class_names: C different names in the order of the labels; underscores count as spaces.
            Another list can be assigned to the attribute, or `with_class_names` asked for a
            classifier of its own.
        tokenizer: the model's transformers tokenizer or processor, or its open_clip tokenizer.
        template: one text, or several, each with `{}` where the class name goes.

    Raises:
        ValueError: empty or repeated class names, a template without `{}`; when called, labels out
            of range, a text that is longer than the model takes, one in which prompts would take
            the place of the class name, or features of another list of classes.
        TypeError: when called, a model without an image and a text tower.

    Example:
        >>> objective = ClassNameClassifier(["cat", "dog"], processor)
        >>> objective(model, pixel_values=pixels, labels=labels)["loss"].backward()
        >>> other = objective.with_class_names(["red panda", "raccoon"])
    """

    features_of_classes = ("text",)

    def __init__(
        self,
        class_names: Sequence[str],
        tokenizer: Callable[..., Any],
        template: str | Sequence[str] = "a photo of a {}.",
    ) -> None:
        super().__init__()
        self._class_names = clean_class_names(class_names)
        self._templates = clean_templates(template)
        self.tokenizer = tokenizer
        self._tokens: dict[str, torch.Tensor] = {}
        self._cache, self._frozen_cache = FeatureCache(), FeatureCache()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self._class_names

    @class_names.setter
    def class_names(self, class_names: Sequence[str]) -> None:
        self._class_names, self._tokens = clean_class_names(class_names), {}

    @property
    def templates(self) -> tuple[str, ...]:
        """The texts that the names are put into."""
        return self._templates

    @templates.setter
    def templates(self, template: str | Sequence[str]) -> None:
        self._templates, self._tokens = clean_templates(template), {}

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
            tokens = towers.tokenize(model, self.tokenizer, self.texts())
            check_names_are_left(model, next(iter(tokens.values())), self.class_names)
            self._tokens = tokens
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
            class_features: what `class_features(model)` returned, (C, D), or text features of all
                templates, (T·C, D), to leave out the text tower at inference; they hold as long as
                neither the classes nor the model's weights change.
            features: return the features as well, of length one: "image" (B, D) and "text"
                (T·C, D) in the order of `texts()`, or the class features where these were given.
        """
        result: dict[str, Any]
        if class_features is None:
            class_features = self._kept_features(model)
        if class_features is None:
            tokens = self.tokens(model, pixel_values.device)
            output = towers.joint_forward(model, tokens, pixel_values)
            images, texts = output.image_features, output.text_features
            result = {"logits": self._class_logits(output)}
        else:
            images, texts = towers.encode_images(model, pixel_values), class_features
            result = {"logits": self.logits(model, images, self.class_means(texts))}
        if features:
            result["features"] = {"image": images, "text": texts}
        if labels is not None:
            self._check_labels(labels)
            result |= cross_entropy(result["logits"], labels, num_items_in_batch)
        return result

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of labels in a batch."""
        return (batch["labels"] != IGNORED).sum()

    def frozen(self, model: nn.Module, **batch: Any) -> dict[str, Any]:
        """Return the outputs of the frozen model, whose class features are computed once.

        Args:
            model: the model with its adapter off (`graftune.adapters.base.frozen.frozen_base`).
            **batch: as for a call.
        """
        if not is_whole(model):
            return self(model, **batch)
        base = base_of(model)
        state = (self.class_names, self.templates, frozen_state(base))
        features = self._frozen_cache.get(base, state, lambda: self._text_features(model))
        return self(model, **batch, class_features=features)

    @torch.no_grad()
    def class_features(
        self,
        model: nn.Module,
        template: str | Sequence[str] | None = None,
        of_length_one: bool = True,
    ) -> torch.Tensor:
        """Return the features of the classes, of length one: (C, D).

        Args:
            model: the model, wrapped or not.
            template: other templates than the objective's own.
            of_length_one: bring each template's features to length one before their mean is taken.

        Example:
            >>> features = objective.class_features(model)
            >>> logits = objective(model, pixels, class_features=features)["logits"]
        """
        other = self if template is None else self.with_class_names(self.class_names, template)
        return other.class_means(other._text_features(model, of_length_one))

    def _text_features(self, model: nn.Module, of_length_one: bool = True) -> torch.Tensor:
        """The features of `texts()`, for inference: (T·C, D)."""
        tokens = self.tokens(model, next(model.parameters()).device)
        return towers.encode_texts(model, tokens, normalize=of_length_one)

    def class_means(self, text_features: torch.Tensor) -> torch.Tensor:
        """Return the mean over templates of text features, of length one: (T·C, D) to (C, D)."""
        count, classes, templates = len(text_features), len(self.class_names), len(self.templates)
        if count == classes:
            return F.normalize(text_features, dim=-1)
        if count != templates * classes:
            raise ValueError(
                f"there are features of {count} texts for {classes} class names in {templates} "
                "templates: they belong to another list of classes; compute them anew with "
                "class_features(model)"
            )
        means = text_features.unflatten(0, (len(self.templates), -1)).mean(0)
        return F.normalize(means, dim=-1)

    def logits(
        self, model: nn.Module, images: torch.Tensor, class_features: torch.Tensor
    ) -> torch.Tensor:
        """Return the model's logits of features of length one: (B, D) and (C, D) to (B, C)."""
        return towers.logits_of(model, images, class_features)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and class-balanced accuracy of logits (N, C) against labels (N,)."""
        return accuracies(predictions, labels)

    def _kept_features(self, model: nn.Module) -> torch.Tensor | None:
        """The text features in evaluation; None in training, where they depend on the step."""
        if model.training or torch.is_grad_enabled() or not is_whole(model):
            return None
        base = base_of(model)
        state = (self.class_names, self.templates, state_of(base))
        return self._cache.get(base, state, lambda: self._text_features(model))

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
