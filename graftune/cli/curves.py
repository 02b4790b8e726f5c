"""The curves of a run: losses, learning rate and metrics over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftune.integrations.extras import require

Series = dict[str, list[tuple[int, float]]]

# Of what a trainer logs, what is no loss.
_NO_TERMS = frozenset({"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos"})
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_TRAINING = "train_"
_MEASURED = "eval_"


def is_speed(name: str) -> bool:
    """Tell the speed of a measurement from what was measured."""
    return name.endswith(_SPEEDS)


def series(history: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Sort what a trainer has logged into curves.

    Args:
        history: entries with a "step", as `trainer.state.log_history` has them.

    Returns:
        "loss" with the loss, its terms and the loss of what was measured; "learning rate"; and
        "metrics" with what else was measured: (step, value) pairs by name, no curve without points.

    Example:
        >>> series([{"step": 1, "loss": 2.0, "learning_rate": 0.1}])["loss"]
        {'loss': [(1, 2.0)]}
    """
    found: dict[str, Series] = {"loss": {}, "learning rate": {}, "metrics": {}}
    for entry in history:
        is_training = "loss" in entry
        for name, value in entry.items():
            kind = _kind(name, is_training)
            if kind is not None and isinstance(value, (int, float)):
                shown = name.removeprefix(_MEASURED) if kind == "metrics" else name
                found[kind].setdefault(shown, []).append((entry["step"], float(value)))
    return {kind: curves for kind, curves in found.items() if curves}


def _kind(name: str, is_training: bool) -> str | None:
    if name == "learning_rate":
        return "learning rate"
    if name in ("loss", f"{_MEASURED}loss"):
        return "loss"
    if name.startswith(_MEASURED):
        return None if is_speed(name) else "metrics"
    if is_training and name not in _NO_TERMS and not name.startswith(_TRAINING):
        return "loss"
    return None


def draw(history: Sequence[Mapping[str, Any]], file: str | Path, title: str) -> None:
    """Draw the curves of a run into a PNG file.

    Args:
        history: see `series`.
        file: the picture.
        title: what stands above it.

    Raises:
        ImportError: matplotlib is not installed; names the extra.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot")
    panels = series(history)
    figure, axes = pyplot.subplots(
        1, max(len(panels), 1), figsize=(5 * max(len(panels), 1), 4), squeeze=False
    )
    for axis, (kind, curves) in zip(axes[0], panels.items(), strict=False):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 20 else None
            axis.plot(steps, values, label=name, marker=marker, markersize=3)
        axis.set(title=kind, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
