"""One text as a codec sees it: tokens by bits and by rank, with sizes and ranks, on an offline page."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from basin_lens.errors import TableError
from basin_lens.views.codec_figures import growth_lines, rank_bars, rank_shares
from basin_lens.views.pages.page import Report, page_of, picture

_NEEDED = ("token", "rank", "probability", "bits", "top", "top_probability")
_BITS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # upper edges of the color steps: doubling, as on a log scale
_RANKS = (0, 1, 3, 9, 31, 99, 999)
_SHADES = ("#ffffff", "#fff3d6", "#ffe1a8", "#fdc87a", "#f7a456", "#ea7b41", "#d1512f", "#a62a1f")  # darker: more bits
_DARK = 6  # the first step on which the text is white
_STEPS = [(shade, "#fff" if step >= _DARK else "#1b1b1b") for step, shade in enumerate(_SHADES)]
_SPACES = {" ": "·", "\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}


def code_page(
    table: pd.DataFrame,
    *,
    title: str = "What does each token cost?",
    facts: Mapping[str, str] | None = None,
    growth: pd.DataFrame | None = None,
    zipf: Float[np.ndarray, " ranks"] | None = None,
) -> Report:
    """A page to look at one text: tokens colored by bits or by rank, the model's expectations on hover, sizes, ranks.

    Args:
        table: one row per token, as from `basin_lens.codec.TextCodec.ranks`.
        title: heading of the page.
        facts: shown as a small table below it.
        growth: sizes of prefixes in bytes: `original`, and a column for each coder.
        zipf: probability of each rank under a fitted law, drawn over the ranks' histogram.

    Returns:
        a `Report` with `.html` and `.save(path)`; it asks no outside site for anything. Texts are data in it, never markup.

    Raises:
        TableError: a column is missing, or no tokens.

    Example:
        >>> import basin_lens as bl
        >>> codec = bl.codec.TextCodec(bl.load_model())
        >>> "by rank" in bl.views.code_page(codec.ranks("The cat sat on the mat.")).html
        True
    """
    missing = [name for name in _NEEDED if name not in table]
    if missing or table.empty:
        raise TableError(
            f"expected one row per token with {', '.join(_NEEDED)}, got {missing or 'none'}. Use TextCodec.ranks(text)."
        )
    ranks = table["rank"].to_numpy()
    names, shares, _ = rank_shares(ranks)
    told = ", ".join(f"{name}: {share:.1%}" for name, share in zip(names, shares, strict=True))
    drawn = None
    if growth is not None:
        sizes = ", ".join(f"{name} {growth[name].iloc[-1]:,.0f}" for name in growth if name != "original")
        drawn = picture(
            growth_lines(growth),
            f"Sizes along the text. Bytes compressed of {growth['original'].iloc[-1]:,.0f} bytes of text: {sizes}",
            "Bytes of the compressed prefix against bytes of the prefix; the model's are the ideal, without header.",
        )
    line = "" if zipf is None else " Line: the fitted power law."
    return page_of(
        "codec.html",
        title=title,
        facts=dict(facts or {}),
        steps=_STEPS,
        by={"bits": _names(_BITS), "rank": _names(_RANKS)},
        tokens=[_token(row) for row in table.to_dict("records")],
        growth=drawn,
        ranks=picture(
            rank_bars(ranks, zipf),
            f"Shares of ranks. Share of tokens by rank: {told}",
            f"Share of tokens with a rank in each range (logarithmic), from 0 on.{line}",
        ),
    )


@dataclass(frozen=True)
class _Piece:
    """A part of a token's text: its own characters, or a stand-in for one that cannot be seen; after a space, a line may break."""

    text: str
    stand_in: bool = False
    breaks: bool = False


@dataclass(frozen=True)
class _Token:
    """A token on the page: its steps of color, what is said on hover, and its text."""

    bits: int
    rank: int
    note: str
    pieces: list[_Piece]

    @property
    def dark(self) -> bool:
        return max(self.bits, self.rank) >= _DARK


def _token(row: Mapping[Hashable, Any]) -> _Token:
    rank, bits, expected = row["rank"], row["bits"], zip(row["top"], row["top_probability"], strict=True)
    lines = [f"{bits:.2f} bits, p = {row['probability']:.2g}, rank {rank}", *(f"{p:.3f}  {name!r}" for name, p in expected)]
    pieces = [_piece(character) for character in row["token"]] or [_Piece("∅", stand_in=True)]
    return _Token(int(np.searchsorted(_BITS, bits)), int(np.searchsorted(_RANKS, rank)), "\n".join(lines), pieces)


def _piece(character: str) -> _Piece:
    if character in _SPACES:
        return _Piece(_SPACES[character], stand_in=True, breaks=character == " ")
    if character < " ":
        return _Piece(chr(0x2400 + ord(character)), stand_in=True)
    # What has no width or turns the direction of writing would hide, or reorder the text beside it.
    return _Piece(character) if character.isprintable() else _Piece(ascii(character)[1:-1], stand_in=True)


def _names(edges: Sequence[float | int]) -> list[str]:
    """Names of the steps of color."""
    return [*(f"{'≤ ' if edge else ''}{edge:g}" for edge in edges), f"> {edges[-1]:g}"]
