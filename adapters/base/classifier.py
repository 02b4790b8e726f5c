"""A classifier that grows with the classes: new outputs beside the old ones, saved with an adapter.

The classifier is one linear layer, trained in full and saved with the adapter by PEFT's
`modules_to_save`. Its old rows stay as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from graftune.adapters.base.messages import nearest


def mask_classes(logits: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
    """Return logits that are −∞ for all classes but these.

    Training on one task takes its own classes (past and future logits −∞); evaluation that knows
    the task does the same.

    Args:
        logits: (..., C).
        classes: numbers from 0 to C − 1, in any order.

    Raises:
        ValueError: there are no classes, or one is out of range.

    Example:
        >>> mask_classes(torch.zeros(1, 3), [0, 2])
        tensor([[0., -inf, 0.]])
    """
    count = logits.shape[-1]
    kept = torch.as_tensor(classes, device=logits.device).flatten()
    if not kept.numel() or kept.min() < 0 or kept.max() >= count:
        raise ValueError(
            f"classes must be one or more numbers from 0 to {count - 1}, as many as there are "
            f"logits; got {kept.tolist()}"
        )
    masked = torch.ones(count, dtype=torch.bool, device=logits.device)
    masked[kept] = False
    return logits.masked_fill(masked, float("-inf"))


def grow_classifier(model: nn.Module, name: str, outputs: int) -> None:
    """Append outputs to a model's classifier; what is there stays bit for bit.

    Of a classifier in `modules_to_save` all adapters' copies grow, and the base model's own. New
    rows start as those of a new `nn.Linear`, the same in all of them. A config of transformers
    that had a label for each output gets further ones. Optimizers have to be made anew: the
    parameters are other ones.

    Args:
        model: a model, or a `peft.PeftModel`.
        name: the classifier's name in the base model.
        outputs: how many it has afterwards, at least as many as now.

    Raises:
        ValueError: no module of that name, or fewer outputs than there are.
        TypeError: it is not an `nn.Linear`.

    Example:
        >>> model = graftune.wrap(vit, "ovor", modules_to_save=["classifier"])
        >>> grow_classifier(model, "classifier", outputs=20)
    """
    base, holder, own_name, found = _find(model, name)
    layers = _copies(found)
    for layer in layers:
        _check(name, layer, outputs)
    new = outputs - layers[0].out_features
    if not new:
        return
    first = layers[0]
    start = nn.Linear(first.in_features, new, bias=first.bias is not None)
    grown = [_grown(layer, start) for layer in layers]
    if isinstance(found, ModulesToSaveWrapper):
        found.original_module = grown[0]
        for adapter_name, layer in zip(found.modules_to_save, grown[1:], strict=True):
            found.modules_to_save[adapter_name] = layer
    else:
        setattr(holder, own_name, grown[0])
    before = _labels(base)
    if len(before) == first.out_features:
        name_outputs(base, [*before, *(f"LABEL_{n}" for n in range(len(before), outputs))])


def name_outputs(model: nn.Module, names: Sequence[str]) -> None:
    """Name the first outputs of a model in its config, if it has one of transformers.

    Args:
        model: a model, or a `peft.PeftModel`.
        names: of the classes, in the order of the outputs.

    Example:
        >>> name_outputs(model, order.names)
        >>> model.config.id2label[0]
        'cat'
    """
    base = _base(model)
    before = _labels(base)
    if before:
        labels = [*names, *before[len(names) :]]
        config: Any = base.config
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: output for output, label in enumerate(labels)}


def fit_classifier(
    base: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Let a base model's classifier grow to what an adapter's file has, before it is loaded.

    Args:
        base: the bare base model.
        names: the adapter's `modules_to_save`.
        shapes: those of the file's tensors, by their names in it.
    """
    for key, module in list(base.named_modules()):
        is_named = any(key == name or key.endswith(f".{name}") for name in names)
        rows = shapes.get(f"base_model.model.{key}.weight", (0,))[0]
        if is_named and isinstance(module, nn.Linear) and rows > module.out_features:
            grow_classifier(base, key, rows)


def _base(model: nn.Module) -> nn.Module:
    """The base model of a PEFT model, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model


def _labels(base: Any) -> list[str]:
    """The names of the outputs in a config of transformers; empty where there is none."""
    labels = getattr(getattr(base, "config", None), "id2label", None) or {}
    return [labels[output] for output in sorted(labels)]


def _find(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module, str, Any]:
    """The base model, the classifier's holder, its name in there, and what is under that name."""
    base = _base(model)
    modules = dict(base.named_modules())
    if name not in modules:
        raise ValueError(
            f"{type(base).__name__} has no module {name!r} to grow.{nearest(name, modules)}"
        )
    path, _, own_name = name.rpartition(".")
    return base, modules[path], own_name, modules[name]


def _copies(found: Any) -> list[Any]:
    """The classifier itself: the base model's, then each adapter's."""
    if isinstance(found, ModulesToSaveWrapper):
        return [found.original_module, *found.modules_to_save.values()]
    return [found]


def _check(name: str, layer: Any, outputs: int) -> None:
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{name!r} is a {type(layer).__name__}; a classifier that grows is a torch.nn.Linear"
        )
    if outputs < layer.out_features:
        raise ValueError(
            f"{name!r} has {layer.out_features} outputs and cannot shrink to {outputs}: classes "
            "are appended, never taken away"
        )


@torch.no_grad()
def _grown(layer: nn.Linear, start: nn.Linear) -> nn.Linear:
    """A linear layer with further rows, else as the given one."""
    outputs = layer.out_features + start.out_features
    grown = nn.Linear(
        layer.in_features,
        outputs,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    for name, old in layer.named_parameters():
        new = getattr(grown, name)
        new[: len(old)] = old
        new[len(old) :] = getattr(start, name).to(new)
        new.requires_grad_(old.requires_grad)
    return grown.train(layer.training)
