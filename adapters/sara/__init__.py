"""SaRA: the weights of smallest magnitude, trained in place (arXiv 2409.06633)."""

from graftune.adapters.base.registration import register
from graftune.adapters.sara.config import SaraConfig
from graftune.adapters.sara.layer import SaraLayer
from graftune.adapters.sara.model import SaraModel
from graftune.adapters.sara.root import SaraRoot

__all__ = ["SaraConfig", "SaraLayer", "SaraModel", "SaraRoot"]

register("sara", SaraConfig, SaraModel)
