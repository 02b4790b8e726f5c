"""FLoRA: low-rank core space for weights of any number of axes (arXiv 2405.14739)."""

from graftune.adapters.base.registration import register
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.conv import ConvNd, ConvTransposeNd
from graftune.adapters.flora.embedding import Embedding
from graftune.adapters.flora.layer import FloraLayer
from graftune.adapters.flora.linear import Linear
from graftune.adapters.flora.model import FloraModel
from graftune.adapters.flora.parameter import FloraParameters

__all__ = [
    "ConvNd",
    "ConvTransposeNd",
    "Embedding",
    "FloraConfig",
    "FloraLayer",
    "FloraModel",
    "FloraParameters",
    "Linear",
]

register("flora", FloraConfig, FloraModel)
