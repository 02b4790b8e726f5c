"""Where the attentions of a vision transformer are, and what computes their keys and values."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftune.adapters.base.modules import base_modules
from graftune.adapters.prompts.pools import PoolConfig
from graftune.adapters.prompts.prefix import PrefixConfig
from graftune.integrations.libraries.families import recognise

# Blocks of transformers', open_clip's and timm's vision transformers: of towers, which are inside
# other models, and of models.
_OF_TOWERS = (
    "vision_model.encoder.layers",
    "visual.transformer.resblocks",
    "visual.trunk.blocks",
)
_OF_MODELS = (
    "vit.layers",
    "vit.encoder.layer",
    "dinov2.encoder.layer",
    "deit.layers",
    "deit.encoder.layer",
    "transformer.resblocks",
    "encoder.layers",
    "encoder.layer",
    "layers",
    "blocks",
)
_ATTENTIONS = ("self_attn", "attention.attention", "attention", "attn")
_PROJECTIONS = (["k_proj", "v_proj"], ["key", "value"], ["qkv"])


def fill_prefix_config(config: PrefixConfig, model: nn.Module, tokenizer: Any = None) -> None:
    """Fill in the modules that a config of prefixes leaves open for a model.

    Args:
        config: changed in place.
        model: a vision transformer of transformers, timm or open_clip, or a CLIP that has one.
        tokenizer: not used; every filling function takes it.

    Raises:
        ValueError: the model has no vision transformer that is known.
    """
    if config.blocks is not None:
        return
    places = attention_places(model)
    if not places:
        raise ValueError(
            f"the {recognise(model).library} model {recognise(model).architecture} has no vision "
            "transformer whose attentions are known; name `blocks`, `attention` and `projections` "
            f"in the {type(config).__name__}"
        )
    if isinstance(config, PoolConfig):
        places |= query_places(model, places["blocks"])
    for name, value in places.items():
        setattr(config, name, value)


def attention_places(model: nn.Module) -> dict[str, Any]:
    """Return the config fields that reach a model's vision attentions; empty if it has none.

    Example:
        >>> attention_places(timm.create_model("vit_base_patch16_224"))
        {'blocks': 'blocks', 'attention': 'attn', 'projections': ['qkv']}
    """
    modules = dict(base_modules(model))
    # Pictures enter by a convolution: the blocks of a language model, or of the text tower of a
    # CLIP, can have the same names.
    if not any(isinstance(module, nn.Conv2d) for module in modules.values()):
        return {}
    has_text = any(name.endswith("token_embedding") for name in modules)
    for blocks in _OF_TOWERS if has_text else _OF_TOWERS + _OF_MODELS:
        if f"{blocks}.0" not in modules:
            continue
        for attention in _ATTENTIONS:
            found = modules.get(f"{blocks}.0.{attention}")
            projections = None if found is None else _projections(found)
            if projections is not None:
                return {"blocks": blocks, "attention": attention, "projections": projections}
    return {}


def _projections(attention: nn.Module) -> list[str] | None:
    if isinstance(attention, nn.MultiheadAttention):
        return []
    known = dict(base_modules(attention))
    return next((names for names in _PROJECTIONS if all(n in known for n in names)), None)


# Where images enter a vision transformer, and where its features are ready, by the tower's name:
# a pooling head without a class token, or the last norm.
_ENTRIES = ("embeddings", "patch_embed", "conv1")
_SOURCES = ("head", "post_layernorm", "layernorm", "ln_post", "norm")


def query_places(model: nn.Module, blocks: str) -> dict[str, Any]:
    """Return the config fields by which the frozen model's features of an image are reached.

    Args:
        model: a vision transformer, or a model that has one.
        blocks: the name of its blocks, as `attention_places` returned it.

    Raises:
        ValueError: they are not known.
    """
    modules = {"": model, **dict(base_modules(model))}
    parts = blocks.split(".")
    for count in range(len(parts) - 1, -1, -1):
        tower = ".".join(parts[:count])
        entry = _first(modules, tower, _ENTRIES)
        if entry is None:
            continue
        # A pooling head is SigLIP's; timm's and others' heads are classifiers.
        pools = f"{tower}.head".removeprefix(".") in modules and _is_siglip(modules[tower])
        source = _first(modules, tower, _SOURCES if pools else _SOURCES[1:])
        if source is not None:
            pool = "first" if _has_class_token(modules[tower]) else "mean"
            return {"tower": tower, "entry": entry, "query": source, "query_pool": pool}
    raise ValueError(
        f"it is not known where the features of {type(model).__name__} come from; name `tower`, "
        "`entry` and `query` in the config"
    )


def _first(modules: dict[str, nn.Module], tower: str, names: tuple[str, ...]) -> str | None:
    found = (f"{tower}.{name}".removeprefix(".") for name in names)
    return next((name for name in found if name in modules), None)


def _is_siglip(tower: nn.Module) -> bool:
    return type(tower).__name__.startswith("Siglip")


def _has_class_token(tower: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, p in tower.named_parameters()}
    return bool(names & {"cls_token", "class_token", "class_embedding"})
