"""Sharing an adapter: its files from and to the Hub, its model card, and how it was trained."""

from graftune.adapters.config import after_saving
from graftune.integrations.hub.card import model_card, refresh_card, write_record
from graftune.integrations.hub.facts import AdapterFacts, describe
from graftune.integrations.hub.fetch import fetch_adapter
from graftune.integrations.hub.push import push_to_hub
from graftune.integrations.hub.record import TrainingRecord, hardware, read_record, versions

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
