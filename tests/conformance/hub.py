"""Stand-ins, of the same architectures, for the tiny models that PEFT's tests load from the Hub.

They are written into a Hub cache of our own, so that every library finds them offline under their
names by its usual way, without a single patch. The weights are random and always the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

COMMIT = "0" * 40
REVISIONS = ("main", "test", "v2.0.0")  # those that the tests ask for; all are the same here

_BERT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
_BERT_CLASSES = {**_BERT, "num_labels": 2}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 1024,
    "max_position_embeddings": 100,
}
_GPT2 = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 5,
    "n_inner": 37,
    "vocab_size": 320,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": 320,
    "decoder_start_token_id": 0,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 64}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_MOE = {
    **_LLAMA,
    "num_local_experts": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
}

# name on the Hub: (transformers class, model type, config)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # causal language models
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "opt", _OPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "opt",
        {**_OPT, "num_hidden_layers": 12, "ffn_dim": 32},
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "bloom",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4, "vocab_size": 320},
    ),
    "gpt2": ("GPT2LMHeadModel", "gpt2", _GPT2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "gpt2", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "gptj",
        {**_GPT2, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        "qwen2",
        {**_LLAMA, "num_key_value_heads": 2},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA,
    ),
    # mixtures of experts, whose experts are parameters without a module of their own
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "llama4_text",
        {
            **_MOE,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 32,
            "attention_chunk_size": 64,
        },
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", "gpt_oss", _MOE),
    # sequence to sequence
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "t5",
        _T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "t5", _T5),
    "google/flan-t5-small": ("T5ForConditionalGeneration", "t5", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "bart",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "vocab_size": 320,
            "max_position_embeddings": 100,
            "forced_eos_token_id": None,
        },
    ),
    # features
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "deberta", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "deberta-v2",
        _DEBERTA,
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModel",
        "clip_text_model",
        {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": 320,
        },
    ),
    # classification
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "bert",
        _BERT_CLASSES,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "roberta",
        _BERT_CLASSES,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "llama",
        _LLAMA,
    ),
    "bert-base-uncased": ("BertForSequenceClassification", "bert", _BERT_CLASSES),
    # vision
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "resnet",
        {
            "embedding_size": 10,
            "hidden_sizes": [10, 20, 30, 40],
            "depths": [1, 1, 2, 1],
            "num_labels": 3,
        },
    ),
}


def build(hub: Path) -> None:
    """Fill a Hub cache with the stand-ins, unless it holds them already."""
    versions = [importlib.metadata.version(name) for name in ("transformers", "diffusers", "torch")]
    text = Path(__file__).read_text(encoding="utf-8") + " ".join(versions)
    stamp, wanted = hub / "stand-ins", hashlib.sha256(text.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(hub, ignore_errors=True)
    for name, (architecture, model_type, config) in TRANSFORMERS.items():
        _write(hub, name, partial(_save, architecture, model_type, config))
    _write(hub, "hf-internal-testing/tiny-sd-pipe", _save_stable_diffusion)
    _save_tokenizer(_snapshot(hub, "peft-internal-testing/tiny-random-OPTForCausalLM"))
    _write(hub, "peft-internal-testing/tiny-opt-lora-revision", _save_lora)
    _save_image_processor(
        _snapshot(hub, "peft-internal-testing/tiny-random-ResNetForImageClassification")
    )
    stamp.write_text(wanted)


def _snapshot(hub: Path, name: str) -> Path:
    return hub / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def _write(hub: Path, name: str, save: Callable[[Path], None]) -> None:
    import torch

    folder = _snapshot(hub, name)
    folder.mkdir(parents=True)
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    for revision in REVISIONS:
        (refs / revision).write_text(COMMIT)
    torch.manual_seed(0)
    save(folder)


def _save(architecture: str, model_type: str, config: dict[str, Any], folder: Path) -> None:
    import transformers

    built = transformers.AutoConfig.for_model(model_type, **config)
    getattr(transformers, architecture)(built).save_pretrained(folder)


def _save_lora(folder: Path) -> None:
    import peft

    peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(folder)


def _byte_vocabulary(end_of_word: bool) -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    if end_of_word:
        tokens += [f"{letter}</w>" for letter in letters]
    return {token: i for i, token in enumerate(tokens)}


def _save_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(_byte_vocabulary(False), [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=100,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def _save_image_processor(folder: Path) -> None:
    settings = {
        "image_processor_type": "ConvNextImageProcessor",
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 224},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _save_stable_diffusion(folder: Path) -> None:
    import transformers
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    vocabulary = _byte_vocabulary(True)
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / "vocab.json").write_text(json.dumps(vocabulary))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        tokens,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="</s>",
        model_max_length=77,
    )
    text_config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=5,
        vocab_size=len(vocabulary),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        sample_size=128,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
