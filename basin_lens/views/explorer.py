"""The explorer of the report page in a notebook, or a picture of it where none can run."""

import importlib.util
from typing import Protocol, cast, runtime_checkable

import pandas as pd

from basin_lens.views.pages.report import KeptLike, explorer_data
from basin_lens.views.pages.shown import Shown

_INSTALL = "This is a picture. To explore the run here: pip install 'basin-lens[widget]', then restart the kernel."


@runtime_checkable
class Explorer(Protocol):
    """What is chosen in an explorer, to read and to set.

    `token`: (seq, pos) as in the table, or None. `layer`: the block's number. `score`: a column's name.
    """

    token: tuple[int, int] | None
    layer: int
    score: str


class StaticExplorer:
    """A run as a picture in a notebook without anywidget: the text of the token chosen, by the score and layer chosen.

    Setting `token`, `layer` or `score` changes what is shown the next time; what the run does not have raises a `TableError`.
    """

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._token: tuple[int, int] | None = None
        self._score, self._layer = shown.first()

    @property
    def token(self) -> tuple[int, int] | None:
        """(seq, pos), or None."""
        return self._token

    @token.setter
    def token(self, value: tuple[int, int] | None) -> None:
        self._token = self._shown.token(value)

    @property
    def layer(self) -> int:
        """The block's number."""
        return self._layer

    @layer.setter
    def layer(self, value: int) -> None:
        self._layer = self._shown.layer(value)

    @property
    def score(self) -> str:
        """A column's name."""
        return self._score

    @score.setter
    def score(self, value: str) -> None:
        self._score = self._shown.score(value)

    def __repr__(self) -> str:
        return f"StaticExplorer({self.score}, layer {self.layer}). {_INSTALL}"

    def _repr_html_(self) -> str:
        return self._shown.still(self.token, self.layer, self.score, _INSTALL)


def explore(table: pd.DataFrame, *, neighbors: KeptLike | None = None, title: str = "Where does this model compress?") -> Explorer:
    """The explorer of `make_report` in a notebook: Jupyter, VS Code, Colab, marimo. What is chosen there comes back to Python.

    The front end gets a layer's numbers when it first shows them, as bytes, and asks nobody but the kernel. Needs
    `pip install 'basin-lens[widget]'`; without it, a picture with that line. In Colab, first
    `google.colab.output.enable_custom_widget_manager()`.

    Args:
        table: from `analyze`, of one run, a row per (layer, seq, pos).
        neighbors: the neighbors behind one score, shown for the token chosen; None: not shown.
        title: heading.

    Returns:
        an explorer that shows in a notebook. Its `token` ((seq, pos) as in the table, or None), `layer` (the block's number) and
        `score` (a column's name) follow what is chosen there, and setting them moves it. A widget's `observe` tells of changes.

    Raises:
        TableError: several runs, no scores, layers with other tokens than the first, the neighbors of another table; later, a
            token, layer or score set that is not shown.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", [bl.analyzers.Surprisal()], layers=[0, 1], progress=False)
        >>> explorer = bl.views.explore(table)
        >>> explorer.layer = 1
        >>> explorer.token = (0, 3)
        >>> explorer.score, explorer.layer, explorer.token
        ('surprisal', 1, (0, 3))
    """
    shown = Shown(explorer_data(table, neighbors, title), table)
    if importlib.util.find_spec("anywidget") is None:
        return StaticExplorer(shown)
    from basin_lens.views.widget import ExplorerWidget

    return cast("Explorer", ExplorerWidget(shown))
