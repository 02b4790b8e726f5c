"""Several methods on one model: one PEFT adapter whose parts are adapters of other methods.

The model keeps its one `PeftModel`: training, saving, loading, several adapters and everything
else work as for one method, in one folder with one config and one file of tensors.
"""

from graftune.adapters.base.registration import register
from graftune.adapters.stack.adding import add_method
from graftune.adapters.stack.config import StackConfig
from graftune.adapters.stack.merging import merge_order
from graftune.adapters.stack.model import StackModel
from graftune.adapters.stack.state import save_parts

__all__ = ["StackConfig", "StackModel", "add_method", "merge_order", "save_parts"]

register("stack", StackConfig, StackModel)
