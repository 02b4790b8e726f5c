"""Small models sharded over processes by torch's `fully_shard`, as Accelerate's FSDP 2 does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graftune
from graftune.adapters.base.sharded import whole
from graftune.adapters.regularizers import Regularization
from graftune.adapters.regularizers.state_file import state_digest
from support.training import adapted, arguments, sentences

# Method, and whether its blocks are sharded on their own: what only the outermost module shards is
# whole from the forward pass to the backward pass.
VARIANTS = {"flora": ("flora", True), "lora": ("lora", True), "flora at once": ("flora", False)}
VARIANTS |= {"lora and masks": ("stack", True), "masks": ("mask_tuning", True)}


def regularizers() -> list[Any]:
    """One of the outputs, three of weights: the adapter's, the merged ones, and their mean."""
    return [
        graftune.FrozenDistillation(2.0),
        graftune.L2ToStart(0.1),
        OfMerged(0.1, of="merged"),
        graftune.GaussianAveraging(mean=1, std=1),
    ]


class OfMerged(graftune.L2ToStart):
    """The other form of the distance, under a name of its own."""

    name = "test_of_merged"


def model_of(variant: str) -> Any:
    """A small language model whose adapter already does something."""
    torch.manual_seed(1)
    model = adapted(VARIANTS[variant][0], "transformers-llama", dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def shard(model: Any, blocks: bool) -> Any:
    """Shard each block and the rest, or all at once."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.get_base_model().model.layers if blocks else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch_of(rank: int, processes: int) -> dict[str, Tensor]:
    """This process's share of eight sentences of which all tokens count."""
    rows = sentences(8)[rank * 8 // processes : (rank + 1) * 8 // processes]
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(model: Any, batch: dict[str, Tensor], steps: int = 3) -> dict[str, Any]:
    """Some steps of gradient descent with regularizers; what came out, whole."""
    regularization = Regularization(model, regularizers())
    regularization.start(steps=steps, epochs=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    objective = graftune.CausalLM()
    found: dict[str, Any] = {"terms": [], "gradients": []}
    for _ in range(steps):
        outputs = regularization(objective, model, batch)
        outputs["loss"].backward()
        regularization.transform_gradients()
        found["terms"].append({k: float(v.detach()) for k, v in outputs["terms"].items()})
        found["gradients"].append(_whole({n: p.grad for n, p in _trained(model).items()}))
        torch.nn.utils.clip_grad_norm_(_trained(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        regularization.step_end()
    regularization.epoch_end()
    found["weights"] = _whole(_trained(model))
    found["state"] = regularization.state_dict()
    with torch.no_grad():
        found["logits"] = objective(model.eval(), **batch_of(0, 1))["logits"]
    return found


def resumes(model: Any, state: Any) -> bool:
    """Whether the state of regularizers comes back as it was."""
    regularization = Regularization(model, regularizers())
    regularization.start(steps=1, epochs=1)
    regularization.load_state_dict(state)
    return state_digest(regularization.state_dict()) == state_digest(state)


def sharded_runs(folder: Path) -> None:
    """Train and save every method's adapter, sharded; leave what this process found."""
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    for variant, (_, blocks) in VARIANTS.items():
        model = shard(model_of(variant), blocks)
        found = train(model.train(), batch_of(rank, processes))
        found["resumes"] = resumes(model, found["state"])
        found["refused"] = _saved_alone(model, folder / f"{variant}-alone")
        save_by_trainer(model, folder / f"{variant}-trainer")
        torch.save(found, folder / f"{variant}-{rank}.pt")


def save_by_trainer(model: nn.Module, folder: Path) -> None:
    """Save as a trainer does whose model Accelerate has sharded."""
    run = graftune.Trainer(
        model_of("flora"), arguments(folder), train_dataset=sentences(8), regularizers=[]
    )
    run.model = run.model_wrapped = model
    run.save_model(str(folder))


def _saved_alone(model: Any, folder: Path) -> str:
    """What the model's own method says, which cannot gather."""
    try:
        model.save_pretrained(folder, is_main_process=distributed.get_rank() == 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}
