"""Where figures are drawn: one of their own or a caller's axes, in one style, with letters that a PDF holds as TrueType."""

import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib.figure
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import SubFigure
from matplotlib.text import Text

from basin_lens.errors import StoreError, TableError
from basin_lens.files import write_file
from basin_lens.records import Unfinished

P = ParamSpec("P")
R = TypeVar("R")

# Type 3, the default, is refused by many journals and cannot be edited as text.
_TRUETYPE: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42}
# A style for dark screens would put white letters beside marks that are made for white paper. Fonts stay the user's.
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "white"),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "black"),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor", "legend.labelcolor"), "black"),
    **dict.fromkeys(("axes.grid", "axes.spines.top", "axes.spines.right"), False),
    "axes.titlecolor": "auto",
}
_FORMATS = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "webp")
SOFT = "#5c6166"


class Figure(matplotlib.figure.Figure):
    """A figure whose letters are TrueType when it is saved as PDF or PostScript, whatever the user's settings are."""

    def savefig(self, fname: object, **options: object) -> None:
        """As matplotlib's, with TrueType fonts and, unless asked otherwise, the figure's own background."""
        saved = super().savefig  # to where the caller says
        with rc_context({**_TRUETYPE, "savefig.facecolor": "auto"}):
            saved(fname, **options)  # type: ignore[arg-type]


def plain(text: object, most: int = 60) -> str:
    """Text as matplotlib will show it, letter by letter: no mathematics between dollars, no line ends, not too long.

    Example:
        >>> from basin_lens.views.canvas import plain
        >>> plain("PRP$")
        'PRP\\\\$'
    """
    shown = str(text).replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥") or "∅"
    shown = shown if len(shown) <= most else shown[: most - 1] + "…"
    # A legend would leave out what begins with an underscore.
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def save(figure: matplotlib.figure.Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> None:
    """Write any matplotlib figure, all of it or nothing; PDF and PostScript with TrueType fonts.

    For figures of your own, in whose axes views of this package were drawn. What the views return by themselves has TrueType fonts
    also with its own `savefig`.

    Args:
        figure: a matplotlib Figure.
        path: ending in .pdf, .png, .svg, .eps, .ps, .jpg or .webp.
        dpi: dots per inch, of pictures made of dots.

    Raises:
        StoreError: another suffix, or the place cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> results = pd.DataFrame({"score": ["a"], "estimate": [0.1], "low": [0.0], "high": [0.2]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bl.views.save(bl.views.forest(results, "score"), f"{folder}/forest.pdf")
        ...     b"/Type3" in Path(folder, "forest.pdf").read_bytes()
        False
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _FORMATS:
        raise StoreError(f"expected a file name ending in one of {', '.join(_FORMATS)}, got {Path(path).name!r}. Choose one.")

    def fill(place: Unfinished) -> None:
        with rc_context(_TRUETYPE):
            figure.savefig(place, format=kind, dpi=dpi)

    write_file(path, fill)


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: figures of their own are made in one style; in a caller's axes, the caller's holds."""

    @wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with _styled(kwargs.get("ax")):
            return function(*args, **kwargs)

    return styled


@contextmanager
def _styled(ax: object) -> Iterator[None]:
    with rc_context(_STYLE if ax is None else {}):
        yield


@dataclass(frozen=True)
class Canvas:
    """A figure to draw in.

    Attributes:
        figure: the whole of it, which is returned.
        part: where panels, title and line below stand: the whole, or the part of a caller's figure that the panels take.
        given: the caller's axes, if there are any and there is one panel.
    """

    figure: matplotlib.figure.Figure
    part: matplotlib.figure.Figure | SubFigure
    given: Axes | None

    @classmethod
    def of(cls, ax: Axes | None, size: tuple[float | int, float | int], *, panels: bool = False) -> "Canvas":
        """A new figure of some inches, or a caller's axes.

        Several panels need a part of a figure: they take the place of the axes, which stay there empty.

        Raises:
            TableError: no Axes, or for several panels one that is in no grid.
        """
        if ax is None:
            figure = Figure(figsize=size, layout="constrained")
            return cls(figure, figure, None)
        if not isinstance(ax, Axes):
            raise TableError(f"expected one matplotlib Axes as ax, got {type(ax).__name__}. Pass one, such as plt.subplots()[1].")
        held = ax.figure
        whole = held.figure if isinstance(held, SubFigure) else held
        if whole is None or held is None:
            raise TableError("expected an Axes of a figure, got one that was removed from its figure. Make it anew.")
        assert isinstance(whole, matplotlib.figure.Figure)
        if not panels:
            return cls(whole, held, ax)
        place = ax.get_subplotspec()
        if place is None:
            raise TableError(
                "expected an Axes of a grid for a figure of several panels, got one placed by hand. Make it with plt.subplots."
            )
        ax.set_axis_off()
        return cls(whole, held.add_subfigure(place), None)

    @property
    def own(self) -> bool:
        """Whether the figure was made here, with room for a legend beside the axes."""
        return self.given is None and self.part is self.figure

    def axes(self) -> Axes:
        """The one axes to draw in."""
        return self.part.add_subplot() if self.given is None else self.given

    def finish(self, title: str, caption: str) -> matplotlib.figure.Figure:
        """A heading above the axes and a line below them, broken to the width there is; returns the figure."""
        title, caption = plain(title, 200) if title else "", caption.replace("$", r"\$")
        if self.given is not None:
            wide = self.given.get_window_extent().width
            if title:
                _fit(self.figure, self.given.set_title("", loc="left", fontsize=10, fontweight="bold"), title, wide)
            if caption:
                below = self.given.annotate(
                    "",
                    (0, 0),
                    xycoords=("axes fraction", self.given.xaxis.label),
                    xytext=(0, -4),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color=SOFT,
                    annotation_clip=False,
                    gid="caption",
                )
                _fit(self.figure, below, caption, wide)
            return self.figure
        # Letters take more room in coarser pictures; a part of a caller's figure becomes narrower when its layout is made.
        wide = (0.94 if self.part is self.figure else 0.75) * self.part.bbox.width
        if title:
            _fit(self.figure, self.part.suptitle("", x=0.012, ha="left", fontsize=10, fontweight="bold"), title, wide)
        if caption:
            _fit(self.figure, self.part.supxlabel("", x=0.012, ha="left", fontsize=8, color=SOFT), caption, wide)
        return self.figure


def _fit(figure: matplotlib.figure.Figure, text: Text, words: str, room: float) -> None:
    """Break the words into as few lines as they have room for, in dots."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Letters are of different widths: begin with more of them than will fit.
    for letters in range(max(12, int(22 * room / figure.dpi)), 10, -2):
        text.set_text("\n".join(textwrap.wrap(words, letters, break_on_hyphens=False)))
        if text.get_window_extent(renderer).width <= room:
            return
