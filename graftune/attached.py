"""The PEFT model of what has adapters already."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from graftune.adapters.base.attached import attached as attached_to
from graftune.integrations.libraries.pipelines import target_of, tell_diffusers


def attached(model: Any, *, component: str | None = None) -> PeftModel:
    """Return the PEFT model of a model, or of a pipeline's model, that has adapters already.

    What `graftune.wrap` and `graftune.load` return, once more; and for adapters that were put in
    by `model.add_adapter(config)` of diffusers or transformers, which makes no `peft.PeftModel`.
    With it they are saved as a PEFT folder, published, merged, unloaded, exported. Nothing is
    copied or changed.

    Args:
        model: with adapters of one method; or a pipeline of diffusers.
        component: of a pipeline, the model's name; None: its only unet or transformer.

    Raises:
        ValueError: there are no adapters, or adapters of several methods; no such component.

    Example:
        ```python
        pipeline.unet.add_adapter(graftune.SaraConfig(fraction=0.1))
        graftune.attached(pipeline).save_pretrained("my-sara")
        ```
    """
    found = attached_to(target_of(model, component))
    tell_diffusers(found)
    return found
