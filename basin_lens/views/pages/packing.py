"""Numbers in a page: steps of one or two bytes, alike bytes together, compressed; `explorer/decode.mjs` reads them."""

import base64
import zlib

import numpy as np

from basin_lens.values import Facts

SCORE_STEPS = 1023
DISTANCE_STEPS = 255


def packed_floats(values: np.ndarray, steps: int, *, run: int = 1) -> Facts:
    """Values as steps that are even in asinh((value - median) / spread), 0 for NaN.

    Near the median a step is a small part of the spread (that of the middle half); values far out have coarser steps, and do not
    make those of all others coarse.

    Args:
        values: any shape; what is not finite is none.
        steps: how many there are, at most 65,535; at most 255 for runs.
        run: of so many values that follow one another, each but the first is the difference to the one before: of values that rise,
            small numbers, which compress.
    """
    values = np.asarray(values, float).ravel()
    known = np.isfinite(values)
    if not known.any():
        return {"middle": 0.0, "spread": 1.0, "low": 0.0, "high": 0.0, "run": run, **_packed(np.zeros(len(values)), steps)}
    first, middle, last = (float(q) for q in np.percentile(values[known], (25, 50, 75)))
    spread = last - first or float(np.ptp(values[known])) or 1.0
    bent = np.arcsinh((np.where(known, values, middle) - middle) / spread)
    low, high = float(bent[known].min()), float(bent[known].max())
    scaled = np.zeros(len(values)) if high == low else (bent - low) / (high - low) * (steps - 1)
    whole = np.where(known, np.rint(scaled) + 1, 0).astype(int)
    if run > 1:
        whole = (np.diff(whole.reshape(-1, run), axis=1, prepend=0) % 256).ravel()
    return {"middle": middle, "spread": spread, "low": low, "high": high, "run": run, **_packed(whole, steps)}


def packed_rows(rows: np.ndarray) -> Facts:
    """Rows of a bank, each plus one; 0 for none (a negative row)."""
    rows = np.maximum(np.asarray(rows).ravel(), -1) + 1
    return _packed(rows, int(rows.max(initial=0)))


def _packed(whole: np.ndarray, most: int) -> Facts:
    width = 1 if most < 2**8 else 2 if most < 2**16 else 4
    planes = whole.astype(f"<u{width}").view("u1").reshape(-1, width).T
    return {"width": width, "steps": most, "data": base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()}
