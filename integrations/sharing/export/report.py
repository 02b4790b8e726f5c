"""What an export wrote, and how far it is from the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how far it is from the adapter.

    Args:
        format: "lora", "locon", "merged" or "difference".
        files: the files that were written.
        tensors: how many tensors they hold.
        exact: whether they say what the adapter says, up to rounding to float32.
        errors: for each adapted base tensor ‖ΔW' − ΔW‖ / ‖ΔW‖ in Frobenius norms, where ΔW is what
            the adapter adds to the tensor and ΔW' what the export adds; 0 where all that differs
            is rounding to float32 or better.
        error: the same of all tensors together, √(Σ‖ΔW' − ΔW‖²) / √(Σ‖ΔW‖²).
        max_rounding: for "merged" and "difference", the largest amount by which rounding to the
            stored dtype changed a number; 0 otherwise.
    """

    format: str
    files: tuple[Path, ...]
    tensors: int
    exact: bool
    errors: dict[str, float]
    error: float
    max_rounding: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of the files together."""
        return sum(file.stat().st_size for file in self.files)


# A relative error below this is rounding to float32.
_ROUNDING = 1e-7


class ErrorTally:
    """Relative Frobenius errors of single tensors and of all together.

    Example:
        >>> tally = ErrorTally()
        >>> tally.enter("a", squared_error=1.0, squared_norm=4.0)
        >>> tally.errors, tally.error
        ({'a': 0.5}, 0.5)
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self._squared_error = 0.0
        self._squared_norm = 0.0

    def enter(self, name: str, squared_error: float, squared_norm: float) -> None:
        """Note ‖ΔW' − ΔW‖² and ‖ΔW‖² of one tensor."""
        self.errors[name] = _ratio(squared_error, squared_norm)
        self._squared_error += squared_error
        self._squared_norm += squared_norm

    @property
    def exact(self) -> bool:
        """Say whether there are no errors but those of rounding to float32."""
        return all(error <= _ROUNDING for error in self.errors.values())

    @property
    def error(self) -> float:
        return _ratio(self._squared_error, self._squared_norm)


def _ratio(squared_error: float, squared_norm: float) -> float:
    if squared_error == 0:
        return 0.0
    return float("inf") if squared_norm == 0 else (squared_error / squared_norm) ** 0.5
