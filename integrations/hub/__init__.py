"""Sharing an adapter: its files from and to the Hub, its model card, and how it was trained."""

from graftune.adapters.config import after_saving

from .card import model_card, refresh_card, write_record
from .facts import AdapterFacts, describe
from .fetch import fetch_adapter
from .push import push_to_hub
from .record import TrainingRecord, hardware, read_record, versions

__all__ = [
    "AdapterFacts",
    "TrainingRecord",
    "describe",
    "fetch_adapter",
    "hardware",
    "model_card",
    "push_to_hub",
    "read_record",
    "versions",
    "write_record",
]

if refresh_card not in after_saving:
    after_saving.append(refresh_card)
