"""Protocols that compare adapted CLIPs: several seeds, recorded splits, mean and spread."""

from graftune.integrations.protocols.base_to_novel import base_to_novel, harmonic_mean
from graftune.integrations.protocols.cross_dataset import cross_dataset
from graftune.integrations.protocols.few_shot import few_shot_curve
from graftune.integrations.protocols.study import ProtocolResult, Study

__all__ = [
    "ProtocolResult",
    "Study",
    "base_to_novel",
    "cross_dataset",
    "few_shot_curve",
    "harmonic_mean",
]
