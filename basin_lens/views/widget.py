"""The explorer as an anywidget: Jupyter, VS Code, Colab, marimo. Imported only where anywidget is installed."""

import anywidget
import traitlets

from basin_lens.values import Facts
from basin_lens.views.pages.page import widget_script
from basin_lens.views.pages.shown import Shown

_LINE = "The explorer itself runs where a notebook has its kernel: this is a picture of it. Run the cell to explore."


class ExplorerWidget(anywidget.AnyWidget):
    """One run to look at in a notebook; what is chosen in it is chosen here, and the other way round. Made by `explore`.

    Traits, to read, set and `observe`: `token` (seq, pos) or None, `layer` (the block's number), `score` (a column's name).
    What the explorer does not show is refused with a `TableError`.
    """

    _esm = widget_script()
    token: traitlets.TraitType[tuple[int, int] | None, object] = traitlets.TraitType(None, allow_none=True).tag(sync=True)
    layer: traitlets.TraitType[int, object] = traitlets.TraitType(0).tag(sync=True)
    score: traitlets.TraitType[str, object] = traitlets.TraitType("").tag(sync=True)

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        score, layer = shown.first()
        super().__init__(token=None, layer=layer, score=score)
        self.on_msg(self._answer)

    @traitlets.validate("token")
    def _check_token(self, proposal: Facts) -> tuple[int, int] | None:
        return self._shown.token(proposal["value"])

    @traitlets.validate("layer")
    def _check_layer(self, proposal: Facts) -> int:
        return self._shown.layer(proposal["value"])

    @traitlets.validate("score")
    def _check_score(self, proposal: Facts) -> str:
        return self._shown.score(proposal["value"])

    def _answer(self, _: object, message: object, __: object) -> None:
        self.send(*self._shown.answer(message))

    def __repr__(self) -> str:
        token = "no token" if self.token is None else f"token {self.token}"
        return f"ExplorerWidget({self.score}, layer {self.layer}, {token})"

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[Facts, Facts] | None:
        """The widget, and beside it what stands where it cannot run: exported HTML, a notebook without its kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)  # type: ignore[arg-type]
        if bundle is None:
            return None
        data, metadata = bundle
        still = self._shown.still(self.token, self.layer, self.score, _LINE)
        return {**data, "text/plain": repr(self), "text/html": still}, metadata
