"""Text colored by a score, with CircuitsVis."""

import html
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import StoreError, TableError

_PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<title>{title}</title></head><body style="font-family:system-ui,sans-serif;margin:2rem auto;max-width:52rem;'
    'color:#1b1b1b;background:#fff">{body}</body></html>'
)
_STYLE = "<style>.colored-tokens em{color:#777;font-style:normal;border-bottom:1px dotted #777}</style>"


@dataclass(frozen=True)
class TokenView:
    """A token view: shows in a notebook, `save` writes a page that works offline.

    `html` is a fragment that carries its own script; it asks no outside site for anything.
    """

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page.

        Raises:
            StoreError: the place cannot be written.
        """
        try:
            Path(path).write_text(_PAGE.format(title=html.escape(self.title), body=self.html), encoding="utf-8")
        except OSError as error:
            raise StoreError(f"expected a place that can be written, got {os.fspath(path)!r}: {error.strerror}.") from error


def token_view(table: pd.DataFrame, column: str, layer: int, *, seq: int | None = None) -> TokenView:
    """One sequence's tokens colored by one score at one layer.

    Blue is above the middle of the color scale, red below it; the middle is 0 for a score that takes both signs here, else the
    sequence's median (a score of one sign would be one flat color). Hover shows the difference from that middle. Tokens without a
    score are gray and underlined.

    Args:
        table: from `analyze`, of one run.
        column: a score.
        layer: block index.
        seq: which sequence; None: the first of the table.

    Returns:
        a view that shows in a notebook and has `.save("x.html")`.

    Raises:
        TableError: no such column, layer or sequence; several runs.

    Source: CircuitsVis `ColoredTokens`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", [bl.analyzers.Surprisal()], layers=[0], progress=False)
        >>> bl.views.token_view(table, "surprisal", layer=0).title
        'surprisal, layer 0, sequence 0 (text-0)'
    """
    # Importing CircuitsVis imports torch.
    from circuitsvis.tokens import colored_tokens

    tables.require(table, column, "seq", "token")
    if table["run"].nunique() != 1:
        raise TableError(f"expected a table of one run, got {table['run'].nunique()}. Choose one: table[table.run == ...].")
    facts = tables.scores(table).get(column)
    if facts is None:
        raise TableError(f"expected a score, got {column!r}; the table has {list(tables.scores(table))}.")
    rows = tables.at_layer(table, layer)
    seq = int(rows["seq"].iloc[0]) if seq is None else seq
    rows = rows[rows["seq"] == seq].sort_values("pos")
    if rows.empty:
        raise TableError(f"expected a sequence of the table, got {seq}; it has 0 to {table['seq'].max()}.")
    values = rows[column].to_numpy(float)
    known = values[np.isfinite(values)]
    middle = 0.0
    if len(known) and (known.min() >= 0 or known.max() <= 0):
        middle = float(np.median(known))
    shown = np.nan_to_num(values - middle, nan=0.0, posinf=0.0, neginf=0.0)
    bound = float(np.abs(shown).max()) or 1.0
    tokens = [visible(token, bool(np.isfinite(value))) for token, value in zip(rows["token"], values, strict=True)]
    drawn = colored_tokens(tokens, shown.tolist(), -bound, bound, "#d6604d", "#4393c3").local_src
    title = f"{column}, layer {layer}, sequence {seq} ({rows['doc'].iloc[0]})"
    caption = (
        f"{column} at layer {layer} in sequence {seq} of {rows['doc'].iloc[0]}. Unit: {facts['unit']}. White is {middle:.3g}, "
        f"blue up to +{bound:.3g} from it, red down to -{bound:.3g}; hover shows the difference from {middle:.3g}. "
        f"{int(np.isnan(values).sum())} of {len(values)} tokens have no score (gray, underlined)."
    )
    body = f'{_STYLE}<p style="font-size:.9rem;color:#555">{html.escape(caption)}</p>{drawn}'
    return TokenView(body, title)


def visible(token: str, scored: bool) -> str:
    """Token text as harmless HTML (CircuitsVis writes it into the page as it is), with line ends and empty tokens made visible."""
    text = html.escape(token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥") or "∅")
    # CircuitsVis turns every space into &nbsp;, so the tag can have no attributes: the style is set beside it.
    return text if scored else f"<em>{text}</em>"
