"""Sharing an adapter: its files from and to the Hub, its model card, and how it was trained."""

from graftune.adapters.base.config import after_saving
from graftune.integrations.sharing.card import model_card, refresh_card, write_record
from graftune.integrations.sharing.facts import AdapterFacts, describe
from graftune.integrations.sharing.fetch import fetch_adapter
from graftune.integrations.sharing.push import push_to_hub
from graftune.integrations.sharing.record import TrainingRecord, hardware, read_record, versions

__all__ = [
    "AdapterFacts",
    "TrainingRecord",
    "describe",
    "fetch_adapter",
    "hardware",
    "model_card",
    "push_to_hub",
    "read_record",
    "refresh_card",
    "versions",
    "write_record",
]

if refresh_card not in after_saving:
    after_saving.append(refresh_card)
