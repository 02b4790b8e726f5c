"""Which of PEFT's tests run on which of our methods: a new method is one more `METHODS` row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import peft

from graftune import FloraConfig, MaskTuningConfig, SaraConfig

from .translate import ANY, Method, Template

LORA = Template(
    peft.LoraConfig,
    renamed={"lora_dropout": "dropout", "init_lora_weights": "init_weights"},
    neutral={"lora_alpha": ANY, "bias": ("none",)},
)
LOKR = Template(
    peft.LoKrConfig,
    neutral={"alpha": ANY, "rank_dropout": (0.0,), "module_dropout": (0.0,)},
)

# A mask has no rank, no scale and no branch with an input to drop from.
MASKED_LORA = Template(
    peft.LoraConfig,
    renamed={"init_lora_weights": "init_weights"},
    neutral={
        "r": ANY,
        "lora_alpha": ANY,
        "lora_dropout": ANY,
        "rank_pattern": ANY,
        "alpha_pattern": ANY,
        "bias": ("none",),
    },
)
MASKED_LOKR = Template(
    peft.LoKrConfig,
    neutral={"r": ANY, "alpha": ANY, "rank_dropout": (0.0,), "module_dropout": (0.0,)},
)
SPARSE_LORA = Template(
    peft.LoraConfig,
    renamed={"init_lora_weights": "init_weights"},
    neutral={"r": ANY, "lora_alpha": ANY, "lora_dropout": (0.0,), "bias": ("none",)},
)
SPARSE_LOKR = Template(
    peft.LoKrConfig,
    neutral={"r": ANY, "alpha": ANY, "rank_dropout": (0.0,), "module_dropout": (0.0,)},
)

METHODS = (
    Method(
        "FLoRA",
        FloraConfig,
        templates=(LORA, LOKR),
        mixed_batches=True,
        treated_as={
            # Core and factors start near zero: at the usual rate they move too little to be seen.
            "*::test_only_params_are_updated?FLoRA-Embedding*": "HiraConfig",
            # Three plain gradient steps on inputs up to 90 diverge at the usual rate.
            "*::test_parameters_after_loading_model?FLoRA-*": "RandLoraConfig",
            "*::test_disable_adapters?FLoRA-Conv2d Groups2*": "PveraConfig",
        },
        extra={
            "test_name,model_id,config_cls,config_kwargs": (
                ("ranks", "MLP", {"target_modules": ["lin0", "lin1"], "r": [4, 2]}),
                ("rank pattern", "MLP2", {"target_modules": "lin.", "rank_pattern": {"lin1": 1}}),
                (
                    "scale pattern",
                    "MLP",
                    {
                        "target_modules": ["lin0", "lin1"],
                        "scale": 2.0,
                        "scale_pattern": {"lin0": 0.5},
                    },
                ),
                ("dropout", "Conv2d", {"target_modules": ["conv2d"], "dropout": 0.1}),
                ("ranks of a kernel", "Conv2d", {"target_modules": "conv2d", "r": [4, 3, 2, 2]}),
                ("Conv1d bigger", "Conv1dBigger", {"target_modules": ["conv1d"], "r": 2}),
                ("Conv2d second", "Conv2d2", {"target_modules": ["lin0", "conv2d", "lin1"]}),
                (
                    "exclude",
                    "MLP",
                    {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
                ),
            )
        },
    ),
    Method(
        "MaskTuning",
        MaskTuningConfig,
        templates=(MASKED_LORA, MASKED_LOKR),
        treated_as={
            # At the usual rate none of ten scores crosses the threshold.
            "*::test_disable_adapters?MaskTuning-Conv2d 1x1*": "TrainableTokensConfig",
        },
    ),
    Method(
        "SaRA",
        SaraConfig,
        templates=(SPARSE_LORA, SPARSE_LOKR),
        always={"fraction": 0.5},
    ),
)


# Why a test that is written around a built-in config cannot hold for ours.
NAMES = "names tensors or classes of LoRA or LoKr"
COUNTS = "counts the parameters of LoRA"
TOKENS = "needs trainable_token_indices, which is LoRA's"
WORDS = "refused as it should be, in other words"
SHAPES = "an adapter of other shapes is refused, with ignore_mismatched_sizes too"
MIXED = "PeftMixedModel has a closed list of methods"
PARAMETRISED = "a weight with a parametrization of its own is refused"
HOTSWAP = "PEFT swaps LoRA only"
GROUPS = "ranks need not be divisible by groups here"
DOWNLOADS = "downloads into a cache of its own"
NUMBERS = "holds numbers that are those of the Hub's weights"
EMBEDDINGS = "embeddings are masked by `target_parameters` only"
SCORES = "compares scores with the tensors of a file, which are their bits"
NO_SUMS = "masks do not add up"
ONE_MASK = "one batch has one mask"
NOT_ADDED = "a mask is no low-rank update that LoRA could say"
TOO_SMALL = "at the test's rate no score crosses the threshold in its few steps"
IN_PLACE = (
    "the base model's weights hold the values of an active SaRA, and are its own again when that "
    "is switched off and in every state dict: tests/adapters/sara/test_in_place.py"
)
BY_CHANCE = "the default threshold is for real weights: at times it selects none of a tiny model's"
OTHER_BASE = "loads onto a base model with other weights, in which other entries are the smallest"
NO_PARTS = "entries of several selections are no selection: adapters are added up as they run"
WHOLE_BATCH = "trained entries are those of a weight, which a whole batch shares"
EVERYTHING = "every module is the default"
TIED = "tied weights are refused where they are named"
WITH_BIAS = "biases are trained as well, which a LoRA on weights cannot say"
PROOF = "takes every tensor of a file for a layer's, and a proof of places is none"
NOT_MADE = "needs a model of the Hub that hub.py does not make"


@dataclass(frozen=True)
class Family:
    """One of PEFT's test files.

    Args:
        minimum: how many tests must pass, or the run fails.
        bodies: tests that write a built-in config in their body (`Class::test` or a pattern) and
            run here with ours in its place.
        names: the built-in classes that ours stand for in these bodies.
        deselected: reasons, to the tests that for this reason cannot hold for our methods.
        quick: patterns of the tests of the quick form; none leaves the file out of it.
        quick_minimum: how many of these must pass.
    """

    minimum: int
    bodies: tuple[str, ...] = ()
    names: tuple[str, ...] = ("LoraConfig", "LoraLayer", "LoKrConfig", "LoKrLayer")
    deselected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    quick: tuple[str, ...] = ()
    quick_minimum: int = 0


FAMILIES: dict[str, Family] = {
    "test_config": Family(
        29,
        deselected={DOWNLOADS: ("TestPeftConfig::test_from_pretrained_cache_dir",)},
        quick=("*",),
        quick_minimum=29,
    ),
    "test_custom_models": Family(
        1600,
        bodies=tuple(
            f"TestPeftCustomModel::{name}"
            for name in (
                "test_add_adapter_rejects_duplicate_name_without_mutation",
                "test_delete_adapter_with_multiple_adapters_works",
                "test_delete_adapter_multiple_adapters_with_modules_to_save",
                "test_weight_bias_attributes",
                "test_multiple_adapters_automatic_modules_to_save",
                "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
                "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
                "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
                "test_add_weighted_adapter_cat_with_rank_pattern",
                "test_multiple_adapters_no_needless_copy_modules_to_save",
                "test_existing_model_card",
                "test_non_existing_model_card",
                "test_load_resized_embedding_ignore_mismatched_sizes",
                "test_save_embedding_layers_excludes_similarly_named_sibling",
                "test_load_does_not_overwrite_similarly_named_sibling",
                "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
                "test_unload_adapter_multihead_attention",
            )
        ),
        deselected={
            NAMES: ("TestMixedAdapterBatches::test_mixed_adapter_batches_mha_raises",),
            SHAPES: ("*::test_load_resized_embedding_ignore_mismatched_sizes",),
            MIXED: ("*::test_add_adapter_rejects_duplicate_name_without_mutation?*-True*",),
            EMBEDDINGS: (
                "*MaskTuning-Embedding*",
                "*::test_save_pretrained_targeting_lora_to_embedding_layer*MaskTuning*",
            ),
            SCORES: ("*::test_parameters_after_loading_model?MaskTuning-*",),
            OTHER_BASE: (
                "TestRequiresGrad::test_loading_model_*SaRA*",
                "*::test_load_does_not_overwrite_similarly_named_sibling?SaRA*",
                "*::test_ignore_mismatched_sizes_with_scalar_modules_to_save?SaRA*",
            ),
            NO_PARTS: (
                "*modules_to_save_merging_adapters*SaRA*",
                "*::test_add_weighted_adapter_cat_with_rank_pattern?SaRA-*",
                "*::test_multiple_active_adapters_forward?SaRA-*",
            ),
            IN_PLACE: ("*::test_only_params_are_updated?SaRA-*",),
            BY_CHANCE: (
                "*::test_multiple_adapters_mixed_modules_to_save?SaRA-*",
                "*::test_multiple_adapters_mixed_modules_to_save_order_switched?SaRA-*",
            ),
            WHOLE_BATCH: ("TestMixedAdapterBatches::*SaRA*",),
            EVERYTHING: (
                "TestDefaultTargetModules::test_default_target_modules_not_set_*SaRA*",
                "TestDefaultTargetModules::test_default_target_modules_list_of_str?SaRA*",
                "TestDefaultTargetModules::test_default_target_modules_str?SaRA*",
            ),
            NO_SUMS: (
                "*modules_to_save_merging_adapters*MaskTuning*",
                "*::test_add_weighted_adapter_cat_with_rank_pattern?MaskTuning-*",
                "*::test_multiple_active_adapters_forward?MaskTuning-*",
            ),
            ONE_MASK: ("TestMixedAdapterBatches::*MaskTuning*",),
        },
        quick=(
            "TestPeftCustomModel::test_save_pretrained",
            "TestPeftCustomModel::test_load_multiple_adapters",
            "TestPeftCustomModel::test_merge_layers",
            "TestPeftCustomModel::test_safe_merge",
            "TestPeftCustomModel::test_only_params_are_updated",
            "TestPeftCustomModel::test_disable_adapters",
            "TestPeftCustomModel::test_delete_adapter",
            "TestPeftCustomModel::test_forward_bfloat16_no_autocast",
            "TestMultipleActiveAdapters::*",
            "TestMixedAdapterBatches::*",
            "TestPeftFsdpStateDict::*",
        ),
        quick_minimum=295,
    ),
    "test_decoder_models": Family(
        181,
        bodies=("TestDecoderModels::test_merge_and_unload_fixes_tie_word_embeddings_config",),
        deselected={
            EMBEDDINGS: (
                "*::test_save_pretrained_targeting_lora_to_embedding_layer?MaskTuning*",
                "*::test_merge_and_unload_fixes_tie_word_embeddings_config?MaskTuning*",
            ),
        },
        quick=("*tiny-random-GPT2LMHeadModel*",),
        quick_minimum=30,
    ),
    "test_encoder_decoder_models": Family(
        51,
        quick=(
            "*::test_merge_layers?*Bart*",
            "*::test_generate?*Bart*",
        ),
        quick_minimum=5,
    ),
    "test_feature_extraction_models": Family(
        57,
        quick=("*tiny-random-BertModel*",),
        quick_minimum=16,
    ),
    "test_seq_classifier": Family(
        36,
        quick=("*::test_save_pretrained?*",),
        quick_minimum=12,
    ),
    "test_token_classification_qa": Family(8),
    "test_target_parameters": Family(
        184,
        bodies=(
            "TestTargetParameters::test_target_parameter_init_does_not_warn_*",
            "TestTargetParameters::test_multiple_adapters_load_order_independent",
            "TestTargetParameters::test_target_parameters_works_with_existing_parametrization",
            "TestTargetParameters::test_target_parameter_on_top_level_module_raises",
        ),
        deselected={
            NAMES: ("TestDecoderModelsTargetParameters::test_*mixed_adapter_batches*",),
            PARAMETRISED: ("*::test_target_parameters_works_with_existing_parametrization",),
            WORDS: ("*::test_target_parameter_on_top_level_module_raises",),
        },
        quick=("*GptOssForCausalLM-4*",),
        quick_minimum=24,
    ),
    "test_vision_models": Family(
        1,
        quick=("*",),
        quick_minimum=1,
    ),
    "test_stablediffusion": Family(8),
    "test_torch_compile": Family(
        8,
        deselected={
            TOO_SMALL: ("*::test_causal_lm_training_*_compile?MaskTuning*",),
            TIED: ("*_compile?SaRA-*target-embeddings*",),
        },
    ),
    "test_low_level_api": Family(
        31,
        bodies=(
            "TestInjectAdapterFromStateDict::test_inject_from_state_dict_[!a]*",
            "TestPeftStateDict::*",
            "TestGetBaseModelStateDict::*",
            "TestStateDictFsdpShapeValidation::*",
        ),
        deselected={
            NAMES: (
                "TestStateDictFsdpShapeValidation::test_save_pretrained_warns_for_unsharded_*",
                "*::test_inject_from_state_dict_missing_keys_warning",
                "*::test_inject_from_state_dict_model_with_weight_conversion",
                "TestPeftStateDict::test_get_and_set_peft_model_state_dict_bias_in_module_name",
            ),
            SCORES: ("*::test_inject_from_state_dict_extra_keys_warning?MaskTuning*",),
            OTHER_BASE: (
                "*::test_base_model_module_named_like_peft_prefix?SaRA*",
                "TestPeftStateDict::test_set_peft_model_state_dict_preserves_input?SaRA*",
            ),
            PROOF: (
                "*::test_inject_from_state_dict_extra_keys_warning?SaRA*",
                "*::test_inject_from_state_dict_low_cpu_mem_usage_with_weight_conversion?SaRA*",
            ),
        },
        quick=(
            "TestInjectAdapterFromStateDict::*",
            "TestPeftStateDict::*",
        ),
        quick_minimum=27,
    ),
    "test_lora_conversion": Family(
        22,
        bodies=("TestLoraConversion::*",),
        names=("LoKrConfig",),
        deselected={
            NAMES: ("TestLoraConversion::test_targeted_modules_identical*",),
            NOT_ADDED: ("TestLoraConversion::*MaskTuning*",),
            WITH_BIAS: ("TestLoraConversion::*SaRA*",),
            NUMBERS: ("TestLoraConversion::test_converted_lora_approximates_original_adapter",),
        },
    ),
    "test_tuners_utils": Family(
        85,
        bodies=(
            "TestTargetedModuleNames::*",
            "TestTargetedParameterNames::*",
            "TestExcludedModuleNames::*",
            "TestModelAndLayerStatus::*",
            "TestBaseTunerWarnForTiedEmbeddings::*",
            "TestFindMinimalTargetModules::test_get_peft_mod*",
            "TestTunerStateDictKeyPrefixes::*",
        ),
        deselected={
            EVERYTHING: (
                "TestTargetedModuleNames::test_realistic_example?SaRA*",
                "TestExcludedModuleNames::test_realistic_example?SaRA*",
            ),
            NAMES: (
                "TestModelAndLayerStatus::test_module_type_small",
                "TestModelAndLayerStatus::test_module_type_large",
                "TestModelAndLayerStatus::test_requires_grad_irregular",
                "TestModelAndLayerStatus::test_target_parameters*",
                "TestModelAndLayerStatus::test_adapter_model_type_*",
                "TestModelAndLayerStatus::test_peft_types_*",
                "TestModelAndLayerStatus::test_model_requires_grad_model_irregular",
                "TestModelAndLayerStatus::test_model_target_parameters*",
                "TestModelAndLayerStatus::test_model_status_with_modules_to_save",
                "TestModelAndLayerStatus::test_mixed_model_raises",
                "TestTunerStateDictKeyPrefixes::test_prefixes_lora",
                "TestTunerStateDictKeyPrefixes::test_prefixes_select_correct_state_dict_keys",
                "TestTunerStateDictKeyPrefixes::test_prefixes_model_with_injected_layers_only",
                "TestTunerStateDictKeyPrefixes::test_prefixes_multiple_adapters_and_*",
            ),
            COUNTS: (
                "TestModelAndLayerStatus::test_nb_params_*",
                "TestModelAndLayerStatus::test_model_with_injected_layers",
            ),
            TOKENS: (
                "TestModelAndLayerStatus::test_*trainable_tokens*",
                "TestTunerStateDictKeyPrefixes::test_prefixes_tuner_layer_inside_auxiliary_*",
            ),
            EMBEDDINGS: (
                "TestModelAndLayerStatus::test_*_large?MaskTuning*",
                "TestModelAndLayerStatus::test_*_irregular?MaskTuning*",
            ),
            NOT_MADE: ("TestModelAndLayerStatus::test_transformers_model",),
        },
        quick=("*",),
        quick_minimum=86,
    ),
    "test_other": Family(
        30,
        bodies=(
            "test_*",
            "TestModulesToSave*",
            "TestTargetingAuxiliaryTrainingWrapper::*",
            "TestGetModuleNamesTiedWithEmbedding::test_get_modules_tied_to_embedding_peft",
        ),
        deselected={
            TOKENS: (
                "TestTargetingAuxiliaryTrainingWrapper::test_targeting_trainable_tokens_raises",
            ),
        },
        quick=("TestModulesToSave*",),
        quick_minimum=13,
    ),
    "test_initialization": Family(
        52,
        bodies=(
            "TestLoraInitialization::test_mha_load_init_model_first",
            "TestLoraInitialization::test_mha_merge_masks_method",
            "TestLoraInitialization::test_valid_*",
            "TestLoraInitialization::test_target_parameters_wrong_type_raises",
            "TestLoraInitialization::test_adding_multiple_adapters_with_same_target_parameters_*",
            "TestLoraInitialization::test_loading_multiple_adapters_with_target_parameters_works",
            "TestNoInfiniteRecursionDeepspeed::*",
            "TestCustomModelConfigWarning::*",
            "TestLowCpuMemUsage::*",
            "TestNamingConflictWarning::*",
            "TestLoadPeftKeyMapping::*",
            "TestWeightTying::*_lokr",
        ),
        deselected={
            MIXED: (
                "TestNoInfiniteRecursionDeepspeed::test_no_infinite_recursion?*-PeftMixedModel?",
                "TestLowCpuMemUsage::test_mixed_model_from_pretrained_low_cpu_mem_usage_works",
            ),
            NAMES: (
                "TestLowCpuMemUsage::test_get_peft_model_*low_cpu_mem_usage_works?MaskTuning*",
                "TestLowCpuMemUsage::test_get_peft_model_*low_cpu_mem_usage_works?SaRA*",
            ),
            OTHER_BASE: (
                "TestLoraInitialization::test_mha_load_init_model_first?SaRA*",
                "TestLoraInitialization::test_loading_multiple_adapters_with_*?SaRA*",
                "TestLoadPeftKeyMapping::test_key_mapping_save_old_load_new_lora?SaRA*",
            ),
            TIED: ("TestWeightTying::test_weight_tying_tied_model_target_modules_lokr?SaRA*",),
            HOTSWAP: ("TestHotSwapping::test_hotswap_works",),
            GROUPS: ("*::test_error_raised_if_rank_not_divisible_by_groups",),
        },
    ),
    "test_mapping": Family(3, bodies=("TestGetPeftModel::*",)),
    "test_hub_features": Family(
        2,
        bodies=("TestLocalModel::*",),
        deselected={NAMES: ("TestModelCard::test_model_card_has_expected_tags*",)},
    ),
}
