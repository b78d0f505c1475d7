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
    make those of all others coarse. The first and the last step are `least` and `most` themselves; `zero` is a step of its own for
    values that are exactly 0, where a byte or two have one left (None: they have not).

    Args:
        values: any shape; what is not finite is none.
        steps: how many there are, at most 65,535; at most 255 for runs.
        run: of so many values that follow one another, each but the first is the difference to the one before: of values that rise,
            small numbers, which compress.
    """
    values = np.asarray(values, float).ravel()
    known = np.isfinite(values)
    if not known.any():
        nothing = {"middle": 0.0, "spread": 1.0, "low": 0.0, "high": 0.0, "least": 0.0, "most": 0.0, "zero": None}
        return {**nothing, "run": run, **_packed(np.zeros(len(values)), steps)}
    first, middle, last = (float(q) for q in np.percentile(values[known], (25, 50, 75)))
    spread = last - first or float(np.ptp(values[known])) or 1.0
    bent = np.arcsinh((np.where(known, values, middle) - middle) / spread)
    low, high = float(bent[known].min()), float(bent[known].max())
    scaled = np.zeros(len(values)) if high == low else (bent - low) / (high - low) * (steps - 1)
    whole = np.where(known, np.rint(scaled) + 1, 0).astype(int)
    zero = steps + 1 if run == 1 and _width(steps) == _width(steps + 1) else None
    if zero is not None:
        whole[known & (values == 0)] = zero
    if run > 1:
        whole = (np.diff(whole.reshape(-1, run), axis=1, prepend=0) % 256).ravel()
    ends = {"least": float(values[known].min()), "most": float(values[known].max()), "zero": zero}
    return {"middle": middle, "spread": spread, "low": low, "high": high, **ends, "run": run, **_packed(whole, steps)}


def packed_rows(rows: np.ndarray) -> Facts:
    """Rows of a bank, each plus one; 0 for none (a negative row)."""
    rows = np.maximum(np.asarray(rows).ravel(), -1) + 1
    return _packed(rows, int(rows.max(initial=0)))


def _width(most: int) -> int:
    return 1 if most < 2**8 else 2 if most < 2**16 else 4


def _packed(whole: np.ndarray, most: int) -> Facts:
    width = _width(most)
    planes = whole.astype(f"<u{width}").view("u1").reshape(-1, width).T
    return {"width": width, "steps": most, "data": base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()}
