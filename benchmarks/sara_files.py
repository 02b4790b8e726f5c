"""How large a saved SaRA is, beside the values in it and beside PEFT's SHiRA.

    python benchmarks/sara_files.py [--size tiny|small|medium|sd15]

Files of adapters of one U-Net, in float32, with as many trained entries each as can be had:

- **SaRA**: as it is saved by default, without places but with a proof of them;
- **SaRA with places**: `store_indices=True`, a bitmask or 32-bit indices a tensor, whichever is
  smaller;
- **SHiRA**: PEFT's, on linear layers, which saves two 32-bit indices for each value.

To reach: SaRA by default takes at most 1.05 × the bytes of its values.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import sara_forms as forms
from measure import environment, write_json
from peft import PeftModel
from rich.console import Console
from rich.table import Table

import graftune

RESULT = Path(__file__).parent / "results" / "sara_files.json"
FILE_TARGET = 1.05
PACKAGES = ["graftune", "torch", "peft", "diffusers"]
NAMES = ("SaRA", "SaRA with places", "SHiRA")


def saved(model: PeftModel) -> dict[str, Any]:
    """Save an adapter; return how many entries it trains and the bytes of its file."""
    entries = forms.count(forms.trained(model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {"entries": entries, "bytes": size, "an entry": size / entries}


def measure(size: str, share: float) -> dict[str, Any]:
    """Save all three at a share of the model's weights."""
    base = forms.unet(size)
    entries = int(share * forms.count(base.parameters()))
    options = {"num_parameters": entries, "regularizers": []}
    found = {"SaRA": saved(forms.adapted(copy.deepcopy(base), "SaRA", entries))}
    with_places = graftune.wrap(copy.deepcopy(base), "sara", store_indices=True, **options)
    found["SaRA with places"] = saved(with_places)
    found["SHiRA"] = saved(forms.adapted(base, "SHiRA", entries))
    return {"share": share, **found}


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether a file is as small as it has to be."""
    found = []
    for row in rows:
        over = row["SaRA"]["an entry"] / 4
        target = {"share": row["share"], "target": f"SaRA over its values ≤ {FILE_TARGET}"}
        found.append({**target, "measured": over, "met": over <= FILE_TARGET})
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a share: entries and bytes an entry."""
    shown = Table("share", *(f"{name}: {what}" for name in NAMES for what in ("entries", "bytes")))
    for row in rows:
        cells = []
        for name in NAMES:
            cells += [f"{row[name]['entries']:,}", f"{row[name]['an entry']:.3f}"]
        shown.add_row(f"{row['share']:.0%}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=forms.SIZES, default="small")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = [measure(args.size, share) for share in args.shares]
    targets = judged(rows)
    Console(width=140).print(table(rows))
    for target in targets:
        verdict = "met" if target["met"] else "missed"
        print(f"{target['share']:.0%}: {target['target']}: {target['measured']:.4f}, {verdict}")
    settings = {"size": args.size, "shares": args.shares, "seed": forms.SEED}
    result = {"settings": settings, "rows": rows, "targets": targets}
    write_json(args.json, {**result, "environment": environment("cpu", PACKAGES)})


if __name__ == "__main__":
    main()
