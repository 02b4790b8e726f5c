"""Loading a base model by its name."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.models.auto import modeling_auto

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.libraries.base_models.base_model import OBJECTIVES, BaseModel
from graftune.integrations.libraries.base_models.names import locate
from graftune.integrations.libraries.base_models.of_diffusers import load_pipeline_part
from graftune.integrations.libraries.base_models.of_transformers import config_of, load_transformers
from graftune.integrations.libraries.base_models.of_zoos import load_open_clip, load_timm

# What a model can be loaded for, by library; the first is what the others' models were made for.
_FOR = {
    "transformers": ("class_names", "image_classes", "causal_lm"),
    "open_clip": ("class_names",),
    "timm": ("image_classes",),
    "diffusers": ("denoising",),
}
# What a transformers model was made for, by the end of its class name.
_MADE_FOR = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForImageClassification": "image_classes",
}


def default_objective(name: str, revision: str | None = None) -> str:
    """Return the name of the objective that a base model was made for.

    Args:
        name: see `locate`.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: there is no such model.
        ValueError: it was made for something else than the known objectives.

    Example:
        >>> default_objective("HuggingFaceTB/SmolLM2-135M")
        'causal_lm'
    """
    source = locate(name)
    if source.library != "transformers":
        return _FOR[source.library][0]
    if source.part:
        return "causal_lm"  # that is what GGUF files hold
    config = config_of(source, revision)
    architecture = (config.architectures or [""])[0]
    for end, objective in _MADE_FOR.items():
        if architecture.endswith(end):
            return objective
    if config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "class_names"
    raise ValueError(
        f"{name} is a {architecture or config.model_type}, of which it is not clear what it is to "
        f"learn; give the objective, one of {listing(OBJECTIVES)}"
    )


def load_base_model(
    name: str,
    objective: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    class_names: Sequence[str] | None = None,
    head: str | None = None,
) -> BaseModel:
    """Load a base model by its name, with its tokenizer, image processor or scheduler.

    Args:
        name: see `locate`.
        objective: what it is loaded for, one of `OBJECTIVES`; None: what it was made for.
        revision: branch, tag or commit on the Hub, for transformers and diffusers.
        dtype: name of a torch dtype for the weights, or "auto" for that of the file (outside
            transformers: float32).
        class_names: for "image_classes", the classes to tell apart.
        head: for "image_classes" with class names: "keep" the model's outputs, "new" ones, or None
            for new ones where its own are not those of the classes.

    Raises:
        OSError: there is no such model, or it cannot be reached.
        ValueError: an unknown name, objective or library; the model is none for the objective.
        ImportError: the library is not installed; names the extra.

    Example:
        >>> base = load_base_model("openai/clip-vit-base-patch16")
        >>> base.objective, type(base.model).__name__
        ('class_names', 'CLIPModel')
    """
    source = locate(name)
    objective = objective or default_objective(name, revision)
    if objective not in OBJECTIVES:
        raise ValueError(
            f"there is no objective {objective!r}.{nearest(objective, OBJECTIVES)} Objectives: "
            f"{listing(OBJECTIVES)}."
        )
    if objective not in _FOR[source.library]:
        raise ValueError(
            f"{name} is a model of {source.library}, which is for {listing(_FOR[source.library])} "
            f"and not for {objective!r}"
        )
    if source.library == "transformers":
        return load_transformers(source, objective, revision, dtype, class_names, head)
    if source.library == "diffusers":
        return load_pipeline_part(source, revision, dtype)
    if revision is not None:
        raise ValueError(
            f"revision is for models of transformers and diffusers; {name} is of {source.library}, "
            "where the name says which weights"
        )
    if source.library == "open_clip":
        return load_open_clip(source, dtype)
    return load_timm(source, dtype, class_names, head)
