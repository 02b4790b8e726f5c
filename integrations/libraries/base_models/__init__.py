"""Base models by name, with what turns pictures and texts into their inputs."""

from graftune.integrations.libraries.base_models.base_model import OBJECTIVES, BaseModel
from graftune.integrations.libraries.base_models.loading import default_objective, load_base_model
from graftune.integrations.libraries.base_models.names import LIBRARIES, Source, locate

__all__ = [
    "LIBRARIES",
    "OBJECTIVES",
    "BaseModel",
    "Source",
    "default_objective",
    "load_base_model",
    "locate",
]
