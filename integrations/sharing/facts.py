"""What can be read off an adapter's folder: method, base model, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from graftune.adapters.base.config import GraftConfig, user_fields
from graftune.adapters.base.folder import check_files, open_tensors, read_config
from graftune.adapters.mask_tuning import is_stored_mask
from graftune.adapters.mask_tuning.coding import mask_shape
from graftune.adapters.sara.stored import is_of_places
from graftune.adapters.stack import StackConfig
from graftune.adapters.stack.config import method_of

# Fields of a user that describe the base model and the task. They are shown apart from settings.
_SHOWN_APART = frozenset({"base_model_name_or_path", "inference_mode", "revision", "task_type"})


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter from its folder.

    Args:
        method: PEFT's name of the method, for example "FLORA".
        about: a sentence on the method and its paper, or on each of several methods; empty for
            PEFT's own.
        settings: the config fields that differ from the method's defaults; of several methods, by
            their names.
        base_model: name or path of the base model as recorded, or None.
        base_id: its repository id on the Hub, or None when it is a path or was not recorded.
        base_revision: its revision, or None.
        base_class: class name of the base model, or None.
        base_library: module of that class, for example "timm.models.vision_transformer", or None.
        base_digest: digest of the base weights under the adapter, or None.
        task_type: PEFT's task type, or None.
        shapes: the tensors' shapes, by name; of an encoded mask that of the mask.
        dtypes: the types in which they are stored, sorted, as safetensors names them.
        bytes: size of the file of tensors.
    """

    method: str
    about: str
    settings: dict[str, Any]
    base_model: str | None
    base_id: str | None
    base_revision: str | None
    base_class: str | None
    base_library: str | None
    base_digest: str | None
    task_type: str | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        """How many numbers are stored, those apart that say where in the base model others are."""
        return sum(math.prod(s) for name, s in self.shapes.items() if not is_of_places(name))


def is_repo_id(name: Any) -> bool:
    """Return whether a base model's name is an id on the Hub and no path of this machine.

    Example:
        >>> is_repo_id("openai/clip-vit-base-patch16"), is_repo_id("/data/clip"), is_repo_id("")
        (True, False, False)
    """
    if not isinstance(name, str) or not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # transformers, too, takes a folder of that name first.
    return not Path(name).exists()


def describe(folder: str | Path) -> AdapterFacts:
    """Read the facts of an adapter from its config and the header of its tensors.

    Args:
        folder: the adapter's folder.

    Raises:
        FileNotFoundError: its config or its tensors are missing.
        ValueError: the config is no adapter's, or the file of tensors is cut off or corrupt.

    Example:
        >>> facts = describe("outputs/adapter")
        >>> facts.method, facts.parameters, facts.bytes
        ('FLORA', 10752, 49376)
    """
    folder = Path(folder)
    check_files(folder)
    config = read_config(folder)
    auto_mapping = config.auto_mapping or {}
    base_model = config.base_model_name_or_path or None
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        masks = {name: file.get_tensor(name) for name in slices if is_stored_mask(name)}
        shapes |= {name: mask_shape(data) for name, data in masks.items()}
        dtypes = tuple(sorted({part.get_dtype() for part in slices.values()}))
    return AdapterFacts(
        method=_name(config.peft_type) or "",
        about=_about(config),
        settings=_settings(config),
        base_model=base_model,
        base_id=base_model if is_repo_id(base_model) else None,
        base_revision=config.revision,
        base_class=auto_mapping.get("base_model_class"),
        base_library=auto_mapping.get("parent_library"),
        base_digest=config.base_digest if isinstance(config, GraftConfig) else None,
        task_type=_name(config.task_type),
        shapes=shapes,
        dtypes=dtypes,
        bytes=path.stat().st_size,
    )


def _about(config: PeftConfig) -> str:
    parts = config.parts if isinstance(config, StackConfig) else []
    return " ".join(filter(None, (getattr(each, "about", "") for each in [config, *parts])))


def _settings(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that are not as the method's defaults have them."""
    if isinstance(config, StackConfig):
        return {method_of(part): _settings(part) for part in config.parts}
    defaults = type(config)().to_dict()
    # The regularizers are recorded by graftune, and readers of a model card want to see them.
    shown = {*user_fields(type(config)), "regularizers"} - _SHOWN_APART
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in sorted(config.to_dict().items())
        if name in shown and value != defaults.get(name)
    }


def _name(member: Any) -> str | None:
    """A member of one of PEFT's enums, or what a file holds in its place, as text."""
    return None if member is None else str(getattr(member, "value", member))
