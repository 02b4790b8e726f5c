"""Several methods on one model: one PEFT adapter whose parts are adapters of other methods.

The model keeps its one `PeftModel`: training, saving, loading, several adapters and everything
else work as for one method, in one folder with one config and one file of tensors.
"""

from ..registration import register
from .adding import add_method
from .config import StackConfig
from .merging import merge_order
from .model import StackModel
from .state import save_parts

__all__ = ["StackConfig", "StackModel", "add_method", "merge_order", "save_parts"]

register("stack", StackConfig, StackModel)
