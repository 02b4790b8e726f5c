"""Prefixes: trained keys and values in front of those of an attention, entered by hooks."""

from graftune.adapters.prompts.prefix.config import PrefixConfig
from graftune.adapters.prompts.prefix.layer import Prefix, PrefixLayer
from graftune.adapters.prompts.prefix.model import PrefixTuner

__all__ = ["Prefix", "PrefixConfig", "PrefixLayer", "PrefixTuner"]
