"""Text colored by a score, as a picture: what stands in a notebook where no script runs."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.patches import Rectangle

from basin_lens.views.canvas import SOFT, Figure, drawn

# CircuitsVis' own.
_LOW, _HIGH = "#d6604d", "#4393c3"
_WIDE, _SIZE, _LETTERS = 8.45, 9.0, 110  # inches, points, letters in a line
_LINE = 0.21  # inches


@dataclass(frozen=True)
class ColoredText:
    """Tokens and their shades: -1 full red, 0 white, 1 full blue, NaN without a score (gray letters)."""

    heading: str
    tokens: Sequence[str]
    shades: Float[np.ndarray, " tokens"]


@drawn
def text_picture(texts: Sequence[ColoredText]) -> Figure:
    """The texts under one another, each under its heading, tokens broken into lines as a notebook would.

    Example:
        >>> import numpy as np
        >>> from basin_lens.views.colored_text import ColoredText, text_picture
        >>> figure = text_picture([ColoredText("surprisal, layer 2", ["The", " lamp", " hums"], np.array([np.nan, 0.5, -1.0]))])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['surprisal, layer 2', 'The', ' lamp', ' hums']
    """
    lines: list[str | list[tuple[int, str, float]]] = []
    for text in texts:
        lines += [text.heading, *_broken(text)]
    figure = Figure(figsize=(_WIDE, _LINE * (len(lines) + 0.5)))
    ax = figure.add_axes((0.01, 0, 0.98, 1))
    ax.set(xlim=(0, _LETTERS), ylim=(len(lines) + 0.25, -0.25))
    ax.set_axis_off()
    for at, line in enumerate(lines):
        if isinstance(line, str):
            ax.text(0, at + 0.55, line, fontsize=_SIZE, fontweight="bold", va="center", parse_math=False)
            continue
        for start, token, shade in line:
            if np.isfinite(shade):
                ground = _HIGH if shade > 0 else _LOW
                ax.add_patch(Rectangle((start, at + 0.05), _width(token), 0.9, color=ground, alpha=min(1.0, abs(shade)), lw=0))
            color = "black" if np.isfinite(shade) else SOFT
            ax.text(start, at + 0.5, token, color=color, fontsize=_SIZE, family="monospace", va="center", parse_math=False)
    return figure


def _broken(text: ColoredText) -> list[list[tuple[int, str, float]]]:
    """Lines of (first letter's place, token, shade)."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    place = 0
    for token, shade in zip(text.tokens, text.shades, strict=True):
        shown = token if _width(token) <= _LETTERS else token[: _LETTERS // 2 - 1] + "…"
        if place + _width(shown) > _LETTERS:
            lines.append([])
            place = 0
        lines[-1].append((place, shown, float(shade)))
        place += _width(shown)
    return lines


def _width(token: str) -> int:
    """Letters' places: two for a wide one, none for a mark upon another."""
    return sum(0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in token)
