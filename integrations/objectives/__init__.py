"""Objectives: modules without weights that call a model and return its loss and its outputs.

The protocol that the trainer and the regularizers rely on. An objective is called as
`objective(model, **batch, num_items_in_batch=None, features=False)`, where the model may be wrapped
(DDP, FSDP, torch.compile, PEFT) and is called once, through all its wrappers. It returns a dict:

- "logits": the model's output that the loss is computed on, such as (B, C), (B, L, V) or, of a
  denoiser, the prediction (B, channels, height, width).
- "loss", where the batch has what it needs (labels, if the task has any): the sum over the batch's
  items divided by `num_items_in_batch`, or by their number in this batch where that is None. So the
  gradients of accumulated batches and of several processes add up to that of the whole.
- "mask", where labels can be left out with -100: the positions that count, booleans over the
  leading axes of the logits.
- "features", only if asked for by `features=True`: tensors by name, with the mask's axes first;
  those that the objective names in `features_of_classes` have one row a class or text instead.

Methods that an objective may have:

- `items(batch)`: how many items the loss of this batch sums over. Summed over accumulated batches
  and processes, it is `num_items_in_batch`.
- `frozen(model, **batch)`: what a call returns while the model's adapter is off; it may keep what
  does not change from batch to batch, as the features of class names do not.
- `draw(batch)`: the batch with everything random added that it lacks, such as noise. Calls with one
  drawn batch, of the adapted and of the frozen model, see the same noise. It draws from torch's
  global generators, so that a resumed run draws what the uninterrupted one does.
- `preprocess_logits_for_metrics(logits, labels)`: what to keep of a batch's logits for `metrics`,
  as transformers' trainer uses it; without it the logits themselves are kept.
- `metrics(predictions, labels)`: numbers by name from NumPy arrays over a whole data set.
"""

from graftune.integrations.objectives.causal_lm import CausalLM
from graftune.integrations.objectives.class_names import ClassNameClassifier
from graftune.integrations.objectives.denoising import Denoising
from graftune.integrations.objectives.image_classes import ImageClassifier

__all__ = ["CausalLM", "ClassNameClassifier", "Denoising", "ImageClassifier"]
