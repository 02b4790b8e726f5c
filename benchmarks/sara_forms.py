"""What SaRA's benchmarks compare: U-Nets of Stable Diffusion's shape, and ways to train them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

import graftune
from graftune.adapters.sara import SaraLayer

# Channels of the four levels, width of the text's features, length of the text.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (32, 32, 64, 64), "text": (32, 7), "norm_num_groups": 8},
    "small": {"channels": (128, 256, 512, 512), "text": (768, 77), "norm_num_groups": 32},
    "medium": {"channels": (256, 512, 1024, 1024), "text": (768, 77), "norm_num_groups": 32},
    "sd15": {"channels": (320, 640, 1280, 1280), "text": (768, 77), "norm_num_groups": 32},
}
FORMS = ("frozen", "full", "SaRA", "LoRA", "SHiRA")
SEED = 0


def unet(size: str, device: str = "cpu") -> UNet2DConditionModel:
    """A U-Net of SD 1.5's architecture, of one of the sizes, with random weights."""
    torch.manual_seed(SEED)
    shape = SIZES[size]
    model = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=shape["channels"],
        cross_attention_dim=shape["text"][0],
        norm_num_groups=shape["norm_num_groups"],
        attention_head_dim=8,
        layers_per_block=2,
    )
    return model.to(device).train()


def batch(size: str, count: int, side: int, device: str = "cpu") -> dict[str, Tensor]:
    """Noised latents that want a gradient, time steps and the text's features."""
    generator = torch.Generator().manual_seed(SEED)
    width, length = SIZES[size]["text"]
    sample = torch.randn(count, 4, side, side, generator=generator).to(device)
    return {
        "sample": sample.requires_grad_(),
        "timestep": torch.full((count,), 500, device=device),
        "encoder_hidden_states": torch.randn(count, length, width, generator=generator).to(device),
    }


def adapted(base: nn.Module, form: str, entries: int) -> nn.Module:
    """Make a model ready to be trained in one of the forms.

    Args:
        base: the model; where it is trained in full or not at all it is what is returned.
        form: one of `FORMS`.
        entries: how many numbers are trained, or as nearly as the form allows.
    """
    if form in ("frozen", "full"):
        return base.requires_grad_(form == "full")
    if form == "SaRA":
        return graftune.wrap(base, "sara", num_parameters=entries, regularizers=[])
    if form == "LoRA":
        return get_peft_model(base, lora(base, entries))
    return get_peft_model(base, shira(base, entries))


def lora(base: nn.Module, entries: int) -> LoraConfig:
    """PEFT's LoRA on all linear layers and convolutions."""
    layers = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    per_rank = sum(_lora_numbers(layer) for layer in layers.values())
    rank = max(1, round(entries / per_rank))
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))


def shira(base: nn.Module, entries: int) -> ShiraConfig:
    """PEFT's SHiRA on those linear layers, the only ones it has, that are as large as its rank."""
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}

    def targets(rank: int) -> dict[str, nn.Linear]:
        return {n: m for n, m in layers.items() if rank * sum(m.weight.shape) <= m.weight.numel()}

    def trained(rank: int) -> int:
        return rank * sum(sum(m.weight.shape) for m in targets(rank).values())

    ranks = range(1, max(min(m.weight.shape) for m in layers.values()))
    rank = min(ranks, key=lambda rank: abs(trained(rank) - entries))
    return ShiraConfig(r=rank, target_modules=list(targets(rank)), random_seed=SEED)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def count(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold in all."""
    return sum(tensor.numel() for tensor in tensors)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """How many bytes tensors hold in all."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def places_bytes(model: nn.Module) -> int:
    """Bytes in memory that say where a sparse adapter's entries are."""
    total = 0
    for module in model.modules():
        for by_name in getattr(module, "places", {}).values():
            total += sum(places.nbytes for places in by_name.values())
        total += nbytes(getattr(module, "shira_indices", {}).values())
    return total


def original_values_bytes(model: nn.Module) -> int:
    """Bytes of the base model's original values that are kept beside its weights."""
    layers = (m for m in model.modules() if isinstance(m, SaraLayer))
    return nbytes(tensor for layer in layers for tensor in layer.own_weight.originals())


def forward_backward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """Return a step of forward and backward that leaves no gradients behind."""

    def step() -> None:
        loss(model, inputs).backward()
        for tensor in (inputs["sample"], *model.parameters()):
            tensor.grad = None

    return step


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean square of what the model predicts."""
    return model(**inputs).sample.square().mean()


def _lora_numbers(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return weight.shape[0] + weight[0].numel()


def kept(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, weights and inputs apart."""
    own = {t.untyped_storage().data_ptr() for t in _known(model, inputs)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sparse = tensor.layout == torch.sparse_coo  # SHiRA's
        for part in (tensor._values(), tensor._indices()) if sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss(model, inputs)
    del output
    return sum(found.values())


def _known(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from inputs.values()
