"""Columns of token analyzers in a capture."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from basin_lens.capture.batches import TokenMeasure
from basin_lens.capture.states import CapturedStates

# Values by an analyzer's key, then column, `[n_layers or 1, rows]`.
Columns = dict[str, dict[str, Tensor]]


def keep_values(
    columns: Columns,
    shape: tuple[int, int],
    rows: Int[Tensor, " n"],
    valid: Bool[Tensor, "batch pos"],
    analyzer: TokenMeasure,
    layer: int,
    values: Mapping[str, Tensor],
) -> None:
    """Put what an analyzer measured on one batch at one layer among the columns. `values`: `[batch, pos]` or `[batch]`.

    `shape`: layers of the model, and rows of a column.
    """
    layers, n_rows = shape
    held = columns.setdefault(analyzer.key, {})
    for name, value in values.items():
        if value.ndim == 1:  # one number per sequence: repeated on its tokens
            value = value[:, None].expand(valid.shape)
        height = layers if analyzer.per_layer else 1
        column = held.setdefault(name, torch.full((height, n_rows), torch.nan, dtype=torch.float32, device="cpu"))
        column[layer if analyzer.per_layer else 0, rows] = value.detach()[valid.to(value.device)].float().cpu()


@contextmanager
def all_or_none(capture: CapturedStates, analyzers: Sequence[TokenMeasure]) -> Iterator[None]:
    """Columns that were only begun when an error or an interruption came must not pass for filled ones: they are as before."""
    before = {
        a.key: {name: column.clone() for name, column in capture.columns[a.key].items()} if a.key in capture.columns else None
        for a in analyzers
    }
    try:
        yield
    except BaseException:
        for key, held in before.items():
            if held is None:
                capture.columns.pop(key, None)
            else:
                capture.columns[key] = held
        raise
