"""One number of how new images look and how well they fit their texts."""

from __future__ import annotations

from collections.abc import Mapping


def visual_linguistic_harmony(
    fid: Mapping[str, float], clip: Mapping[str, float]
) -> dict[str, float]:
    """Return, for each of several methods, the sum of what it reaches of the best FID and score.

    VLHI_i = (max FID − FID_i) / (max FID − min FID) + (CLIP_i − min CLIP) / (max CLIP − min CLIP)
    over the methods compared (the visual-linguistic harmony index of SaRA, arXiv 2409.06633,
    experiments); 0 to 2. It ranks the methods that are in it, and changes with them: numbers of two
    comparisons cannot be put side by side. Where all methods have one value, that half is 0.

    Args:
        fid: the Fréchet distance to the new style's images, by method; lower is better.
        clip: the CLIP score, by method; higher is better.

    Raises:
        ValueError: fewer than two methods, or others in one than in the other.

    Example:
        >>> visual_linguistic_harmony({"a": 100.0, "b": 150.0}, {"a": 27.0, "b": 28.0})
        {'a': 1.0, 'b': 1.0}
    """
    if fid.keys() != clip.keys() or len(fid) < 2:
        raise ValueError(
            f"the index compares methods, two at least, with both numbers of each; got the FID of "
            f"{sorted(fid)} and the CLIP score of {sorted(clip)}"
        )
    looks = _shares({name: -value for name, value in fid.items()})
    fits = _shares(clip)
    return {name: looks[name] + fits[name] for name in fid}


def _shares(values: Mapping[str, float]) -> dict[str, float]:
    """Return where values are between the lowest and the highest."""
    low, high = min(values.values()), max(values.values())
    span = high - low
    return {name: (value - low) / span if span else 0.0 for name, value in values.items()}
