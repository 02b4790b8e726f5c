"""FLoRA: low-rank core space for weights of any number of axes (arXiv 2405.14739)."""

from ..registration import register
from .config import FloraConfig
from .conv import ConvNd, ConvTransposeNd
from .embedding import Embedding
from .layer import FloraLayer
from .linear import Linear
from .model import FloraModel
from .parameter import FloraParameters

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
