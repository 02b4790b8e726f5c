"""Where deep prompts go in a CLIP: its blocks, its token embedding, the words they start as."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftune.adapters.prompts.deep import DeepPromptConfig
from graftune.integrations.libraries.families import recognise

# Text towers whose texts begin with their first word rather than with a start of text.
_WITHOUT_START = {"siglip", "siglip2"}
# Vision towers that take padded patches with a mask, behind which there is no place for prompts.
_MASKED_PATCHES = {"siglip2"}


def fill_prompt_config(config: DeepPromptConfig, model: nn.Module, tokenizer: Any = None) -> None:
    """Fill in what a config of deep prompts leaves open for a model.

    Args:
        config: changed in place: the towers' modules and the ids of the words to start as.
        model: a CLIP or SigLIP of transformers or open_clip.
        tokenizer: the model's tokenizer or processor; None looks for it by the model's name.

    Raises:
        ValueError: a tower that is to have prompts is not there or has no place for as many, or
            the words are fewer tokens than there are prompts.
    """
    _check_patches(config, model)
    text = text_places(model) if config.has_text else {}
    vision = vision_places(model) if config.has_vision else {}
    for which, wanted, found in (
        ("text", config.has_text and config.text_blocks is None, text),
        ("vision", config.has_vision and config.vision_blocks is None, vision),
    ):
        if wanted and not found:
            raise ValueError(
                f"{type(model).__name__} has no {which} tower of transformer blocks to put prompts "
                f"into; leave it out with num_tokens_{which}=0, or name its modules in the config"
            )
        for name, value in found.items() if wanted else ():
            setattr(config, name, value)
    _check_context(config, model)
    if config.has_text and config.init_text and config.init_token_ids is None:
        config.init_token_ids = _word_ids(config, model, tokenizer)


def text_places(model: nn.Module) -> dict[str, Any]:
    """Return the config fields that reach a model's text tower; empty if it has none."""
    # SigLIPs, which open_clip knows by their pooling, have no token before the first word.
    last = getattr(getattr(model, "text", None), "pool_type", None) == "last"
    start = 0 if last or recognise(model).architecture in _WITHOUT_START else 1
    for embedding, blocks in (
        ("text_model.embeddings.token_embedding", "text_model.encoder.layers"),
        ("embeddings.token_embedding", "encoder.layers"),
        ("token_embedding", "transformer.resblocks"),
        ("text.token_embedding", "text.transformer.resblocks"),
    ):
        if _has(model, embedding) and _has(model, blocks):
            return {"text_embedding": embedding, "text_blocks": blocks, "text_start": start}
    return {}


def vision_places(model: nn.Module) -> dict[str, Any]:
    """Return the config fields that reach a model's vision tower; empty if it has none."""
    for entry, blocks in (
        ("vision_model.pre_layrnorm", "vision_model.encoder.layers"),
        ("vision_model.encoder.layers.0", "vision_model.encoder.layers"),
        ("pre_layrnorm", "encoder.layers"),
        ("visual.ln_pre", "visual.transformer.resblocks"),
        ("visual.trunk.norm_pre", "visual.trunk.blocks"),
    ):
        if _has(model, entry) and _has(model, blocks):
            return {"vision_entry": entry, "vision_blocks": blocks}
    return {}


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_patches(config: DeepPromptConfig, model: nn.Module) -> None:
    masked = recognise(model).architecture in _MASKED_PATCHES
    if masked and config.has_vision and config.vision_blocks is None:
        raise ValueError(
            f"prompts are not defined for the vision tower of {type(model).__name__}, which masks "
            "the padding of its patches; leave it out with num_tokens_vision=0, or use a SigLIP2 "
            "of fixed resolution, which is a SiglipModel"
        )


def _check_context(config: DeepPromptConfig, model: nn.Module) -> None:
    """Raise when a text has not as many positions as prompts, a start and an end need."""
    length = _context_length(config, model) if config.has_text else None
    needed = config.text_start + config.num_tokens_text + 1
    if length is not None and length < needed:
        raise ValueError(
            f"num_tokens_text={config.num_tokens_text} prompts need texts of {needed} tokens, and "
            f"{type(model).__name__} takes at most {length}; give num_tokens_text of at most "
            f"{length - config.text_start - 1}"
        )


def _context_length(config: DeepPromptConfig, model: nn.Module) -> int | None:
    """The number of positions beside the token embedding; None where there are none."""
    name = (config.text_embedding or "").rpartition(".")[0]
    if not _has(model, name):
        return None
    tables = dict(model.get_submodule(name).named_parameters())
    for table in ("position_embedding.weight", "positional_embedding"):
        if table in tables:
            return int(tables[table].shape[0])
    return None


def _word_ids(config: DeepPromptConfig, model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids of the words that the prompts start as, without start and end of text."""
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    words = config.init_text or ""
    if hasattr(tokenizer, "name_or_path"):  # of transformers
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    elif hasattr(tokenizer, "encode"):
        ids = tokenizer.encode(words)  # open_clip's own
    else:
        # Any other tokenizer of open_clip: ids of a fixed length with start, end and padding.
        row = tokenizer([words])[0].tolist()
        ids = row[config.text_start : row.index(max(row))]
    if len(ids) < config.num_tokens_text:
        raise ValueError(
            f"init_text={words!r} is {len(ids)} tokens and there are {config.num_tokens_text} text "
            f"prompts; give num_tokens_text={len(ids)}, more words, or init_text=None to start at "
            "random"
        )
    return list(ids)[: config.num_tokens_text]


def find_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer that belongs to a model, as far as its name says which.

    Raises:
        ValueError: it cannot be told.
    """
    library = recognise(model).library
    name = getattr(model, "name_or_path", "")
    if library == "transformers" and name:
        from transformers import AutoTokenizer  # takes a while, and few need it

        return AutoTokenizer.from_pretrained(name)
    if library == "open_clip" and getattr(model, "vocab_size", None) == 49408:
        import open_clip

        return open_clip.SimpleTokenizer()
    raise ValueError(
        f"cannot tell which tokenizer belongs to this {type(model).__name__}, whose prompts are to "
        "start as words; give `tokenizer=`, or init_text=None to start at random"
    )
