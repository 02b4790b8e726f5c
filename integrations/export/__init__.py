"""Leaving the plugin: adapters in forms that other tools load without graftune."""

from .difference import apply_difference, export_difference
from .locon import export_locon
from .lora import export_lora
from .merged import export_merged
from .report import ExportReport

__all__ = [
    "ExportReport",
    "apply_difference",
    "export_difference",
    "export_locon",
    "export_lora",
    "export_merged",
]
