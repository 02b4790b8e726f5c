"""Prefixes: trained keys and values in front of those of an attention, entered by hooks."""

from .config import PrefixConfig
from .layer import Prefix, PrefixLayer
from .model import PrefixTuner

__all__ = ["Prefix", "PrefixConfig", "PrefixLayer", "PrefixTuner"]
