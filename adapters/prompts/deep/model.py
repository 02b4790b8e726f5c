"""Deep prompts as a PEFT tuner: which tower gets which prompts."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.hooks import HookedTuner, block_list, check_module
from graftune.adapters.prompts.deep.config import TEXT_PLACES, VISION_PLACES, DeepPromptConfig
from graftune.adapters.prompts.deep.layer import DeepPromptLayer

CHILD = "deep_prompts"  # the name of the layer in the module that holds a tower's blocks


class DeepPromptModel(HookedTuner):
    """A CLIP with prompts in the blocks of its towers (arXiv 2307.06948, section 3.1).

    Args:
        model: the base model.
        config: a `DeepPromptConfig` that names the towers' modules.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the prompts on the meta device, to be loaded next.
    """

    prefix = "deep_prompt_"
    child = CHILD
    tuner_layer_cls = DeepPromptLayer

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of a tower's prompts: (blocks with prompts, n, width).

        Raises:
            ValueError: there are fewer blocks than the depth asks for.
            TypeError: the blocks are not in a `torch.nn.ModuleList` or `torch.nn.Sequential`.
        """
        is_text, name = _tower(config, key)
        depth = config.depth_text if is_text else config.depth_vision
        count = config.num_tokens_text if is_text else config.num_tokens_vision
        blocks = block_list(getattr(module, name))
        if depth > len(blocks):
            which = "text" if is_text else "vision"
            raise ValueError(
                f"`depth_{which}` is {depth}, but the {which} tower has {len(blocks)} blocks; give "
                f"depth_{which} of at most {len(blocks)}"
            )
        return {f"{CHILD}.deep_prompt_tokens": (depth, count, _width(blocks[0]))}

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        missing = _missing_places(config)
        if missing:
            raise ValueError(
                f"DeepPromptConfig needs {', '.join(missing)}: the names of modules of the model. "
                "graftune.wrap(model, config) finds them for the CLIP models of transformers and "
                "open_clip"
            )
        for name in (*TEXT_PLACES, *VISION_PLACES):
            if getattr(config, name) is not None:
                check_module(model, name, getattr(config, name))
        _check_ids(model, config)
        super()._check_targets(model, config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_text, name = _tower(peft_config, current_key)
        blocks = block_list(getattr(target, name))
        layer = getattr(target, CHILD, None)
        if layer is None:
            place = peft_config.text_embedding if is_text else peft_config.vision_entry
            layer = DeepPromptLayer(peft_config.text_start if is_text else None)
            tower = self.model.get_submodule(_common(place, current_key))
            layer.hook(tower, self.model.get_submodule(place), blocks)
            target.add_module(CHILD, layer)
        shape = self.adapter_shapes(peft_config, current_key, target)
        tokens = _initial(peft_config, *shape.values())
        if is_text and peft_config.init_token_ids is not None and peft_config.init_weights:
            embedding = self.model.get_submodule(peft_config.text_embedding)
            tokens = _start_as_words(tokens, embedding, peft_config.init_token_ids)
        layer.update_layer(adapter_name, tokens, peft_config.inference_mode)


def _tower(config: DeepPromptConfig, key: str) -> tuple[bool, str]:
    """Say whether a module holds the text blocks (or the vision blocks), and the list's name."""
    for is_text, blocks in ((True, config.text_blocks), (False, config.vision_blocks)):
        parent, _, name = (blocks or "").rpartition(".")
        if parent == key:
            return is_text, name
    raise ValueError(f"{key!r} holds neither tower's blocks")


def _common(first: str, second: str) -> str:
    """The name of the module that holds both."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _width(block: nn.Module) -> int:
    """The size of the hidden states: that of a block's first norm."""
    return next(p.shape[0] for p in block.parameters() if p.ndim == 1)


def _initial(config: DeepPromptConfig, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * (0.02 if config.init_weights else 1.0)


@torch.no_grad()
def _start_as_words(tokens: Tensor, embedding: Any, ids: list[int]) -> Tensor:
    """Return prompts whose first block's are the embeddings of words, in the words' precision."""
    base: Any = embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding
    if base.weight.is_meta:  # there is nothing to start as before weights are loaded
        return tokens
    words = base.weight[torch.tensor(ids, device=base.weight.device)].to(tokens.device)
    return torch.cat([words[None], tokens[1:].to(words.dtype)])


def _missing_places(config: DeepPromptConfig) -> list[str]:
    wanted = (TEXT_PLACES if config.has_text else ()) + (VISION_PLACES if config.has_vision else ())
    return [name for name in wanted if getattr(config, name) is None]


def _check_ids(model: nn.Module, config: DeepPromptConfig) -> None:
    if not config.has_text or not config.init_token_ids:
        return
    count = getattr(model.get_submodule(config.text_embedding or ""), "num_embeddings", None)
    if count is not None and max(config.init_token_ids) >= count:
        raise ValueError(
            f"`init_token_ids` has the id {max(config.init_token_ids)}, and the token embedding "
            f"has only {count}: the tokenizer belongs to another model"
        )
