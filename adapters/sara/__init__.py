"""SaRA: the weights of smallest magnitude, trained in place (arXiv 2409.06633)."""

from ..registration import register
from .config import SaraConfig
from .layer import SaraLayer
from .model import SaraModel
from .root import SaraRoot

__all__ = ["SaraConfig", "SaraLayer", "SaraModel", "SaraRoot"]

register("sara", SaraConfig, SaraModel)
