"""Leaving the plugin: adapters in forms that other tools load without graftune."""

from graftune.integrations.sharing.export.difference import apply_difference, export_difference
from graftune.integrations.sharing.export.locon import export_locon
from graftune.integrations.sharing.export.lora import export_lora
from graftune.integrations.sharing.export.merged import export_merged
from graftune.integrations.sharing.export.report import ExportReport

__all__ = [
    "ExportReport",
    "apply_difference",
    "export_difference",
    "export_locon",
    "export_lora",
    "export_merged",
]
