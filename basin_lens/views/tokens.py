"""Text colored by scores, with CircuitsVis: one or several at one layer, or all layers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float
from markupsafe import Markup, escape

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.values import whole_numbers
from basin_lens.views import marks
from basin_lens.views.colored_text import ColoredText, text_picture
from basin_lens.views.pages.page import page_of, picture, render, together, within_script


@dataclass(frozen=True)
class TokenView:
    """A token view: shows in a notebook, `save` writes a page that works offline.

    It asks no outside site for anything. `body` and `call` are one view; `script` is CircuitsVis, which a page with several views
    needs only once. `still`: the same as colored text, which stands in a notebook until the script has drawn, and so wherever no
    script runs: in saved notebooks on the web, in those not trusted. `element`: the id of what CircuitsVis fills.
    """

    body: Markup
    call: Markup = field(repr=False)
    script: Markup = field(repr=False)
    title: str
    still: tuple[ColoredText, ...] = field(default=(), repr=False)
    element: str = field(default="", repr=False)

    @property
    def html(self) -> str:
        """A fragment that carries its own script and, until it has run, a picture."""
        return str(render("view.html", view=self, still=picture(text_picture(self.still), self.title) if self.still else None))

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page, all of it or nothing.

        Raises:
            StoreError: the place cannot be written.
        """
        page_of("view_page.html", title=self.title, view=self).save(path)


@whole_numbers(TableError)
def token_view(
    table: pd.DataFrame,
    column: str | Sequence[str],
    layer: int,
    *,
    seq: int | None = None,
    layout: str = "choose",
) -> TokenView:
    """One sequence's tokens colored by one score at one layer, or by several scores to choose from or under one another.

    Blue is above the middle of the color scale, red below it; the middle is 0 for a score that takes both signs here, else the
    sequence's median (a score of one sign would be one flat color). Hover shows the difference from that middle. Tokens without a
    score are gray and underlined.

    With several scores to choose from, each is divided by its largest difference from its middle, so that all run from -1 to 1:
    CircuitsVis has one scale for all. Hover shows them all; the caption has each one's unit and what white, full blue and full red
    are. As rows, the text stands there once for each score, on the score's own scale.

    Args:
        table: from `analyze`, of one run, or from `compare` (`difference`, and the score of either side).
        column: a score, or several.
        layer: block index.
        seq: which sequence; None: the first of the table.
        layout: of several scores: `"choose"` shows one at a time, `"rows"` all of them.

    Returns:
        a view that shows in a notebook and has `.save("x.html")`.

    Raises:
        TableError: no such column, layer or sequence; several runs; another layout.

    Source: CircuitsVis `ColoredTokens` and `ColoredTokensMulti`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", [bl.analyzers.Surprisal()], layers=[0], progress=False)
        >>> bl.views.token_view(table, "surprisal", layer=0).title
        'surprisal, layer 0, sequence 0 (text-0)'
    """
    if layout not in ("choose", "rows"):
        raise TableError(f"expected layout 'choose' or 'rows', got {layout!r}.")
    columns = [column] if isinstance(column, str) else list(column)
    units = _units(table, columns)
    rows, seq = _sequence(tables.at_layer(table, layer), table, seq)
    where = f"layer {layer}, sequence {seq} ({rows['doc'].iloc[0]})"
    values = rows[columns].to_numpy(float)
    if isinstance(column, str):
        return _one(rows["token"], values[:, 0], column, units[column], where)
    if layout == "rows":
        views = [_one(rows["token"], part, name, units[name], where) for name, part in zip(columns, values.T, strict=True)]
        return TokenView(
            together(view.body for view in views),
            together(view.call for view in views),
            views[0].script,
            f"{', '.join(columns)}, {where}",
            tuple(text for view in views for text in view.still),
            views[0].element,
        )
    return _several(rows["token"], values, units, where)


def _one(tokens: pd.Series, values: Float[np.ndarray, " tokens"], column: str, unit: str, where: str) -> TokenView:
    # Importing CircuitsVis imports torch.
    from circuitsvis.tokens import colored_tokens

    middle, bound = middle_and_bound(values)
    shown = _filled(values - middle)
    texts = [visible(token, bool(np.isfinite(value))) for token, value in zip(tokens, values, strict=True)]
    drawn = colored_tokens(texts, shown.tolist(), -bound, bound, "#d6604d", "#4393c3").local_src
    caption = (
        f"{column} at {where}, in {unit}. White is {middle:.3g}, full blue is {middle + bound:.3g}, full red is "
        f"{middle - bound:.3g}; hover shows the difference from {middle:.3g}. {int((~np.isfinite(values)).sum())} of {len(values)} "
        "tokens have no score (gray, underlined)."
    )
    still = ColoredText(f"{column}, {where}", [shown_text(token) for token in tokens], (values - middle) / bound)
    return _assemble(drawn, [caption], f"{column}, {where}", [still])


def _several(tokens: pd.Series, values: Float[np.ndarray, "tokens scores"], units: dict[str, str], where: str) -> TokenView:
    # What `colored_tokens_multi` calls, which passes no bounds on: it would take those of the first score for all.
    from circuitsvis.utils.render import render

    scales = [middle_and_bound(part) for part in values.T]
    middles, bounds = (np.array(part) for part in zip(*scales, strict=True))
    there = np.isfinite(values)
    shown = np.where(there, (values - middles) / bounds, np.nan)
    texts = [visible(token, bool(known.any()), bool(known.all())) for token, known in zip(tokens, there, strict=True)]
    ends = {"positiveBounds": [1.0] * len(units), "negativeBounds": [-1.0] * len(units)}
    drawn = render("ColoredTokensMulti", tokens=texts, values=shown, labels=list(units), **ends).local_src
    caption = (
        f"{', '.join(units)} at {where}: point at a name to color by it, click to keep it. White is the middle of each score, blue "
        "above it, red below; hover shows each score as a share of its largest difference from its middle, so that all run from "
        "-1 to 1. Gray and underlined: no score at all; underlined: some have no score there (NaN)."
    )
    lines = [
        f"{name}, in {unit}: white is {middle:.3g}, full blue (1) is {middle + bound:.3g}, full red (-1) is {middle - bound:.3g}; "
        f"{int((~known).sum())} of {len(values)} tokens have no score."
        for (name, unit), middle, bound, known in zip(units.items(), middles, bounds, there.T, strict=True)
    ]
    words = [shown_text(token) for token in tokens]
    still = [ColoredText(name, words, part) for name, part in zip(units, shown.T, strict=True)]
    return _assemble(drawn, [caption, *lines], f"{', '.join(units)}, {where}", still)


@whole_numbers(TableError)
def layer_view(table: pd.DataFrame, columns: str | Sequence[str], *, seq: int | None = None) -> TokenView:
    """One sequence's tokens colored by any of several scores at any layer, to choose from on the page.

    Colors and hover show the difference from a middle: 0 for a score that takes both signs in this sequence, else the sequence's
    median at that layer. Below the text are the middle and the ends of the colors at each layer.

    Args:
        table: from `analyze`, of one run.
        columns: a score, or several.
        seq: which sequence; None: the first of the table.

    Returns:
        a view that shows in a notebook and has `.save("x.html")`.

    Raises:
        TableError: no such column or sequence; several runs; a layer that lacks some of the tokens.

    Source: CircuitsVis `TextNeuronActivations`.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> table = bl.analyze(model, "The cat sat on the mat.", [bl.analyzers.StateNorm()], layers=[0, 1], progress=False)
        >>> bl.views.layer_view(table, ["state_norm"]).title
        'state_norm, layers 0 to 1, sequence 0 (text-0)'
    """
    from circuitsvis.activations import text_neuron_activations

    columns = [columns] if isinstance(columns, str) else list(columns)
    units = _units(table, columns)
    rows, seq = _sequence(table, table, seq)
    layers = sorted(rows["layer"].unique().tolist())
    parts = [rows[rows["layer"] == layer] for layer in layers]
    if any(part["pos"].tolist() != parts[0]["pos"].tolist() for part in parts):
        raise TableError(
            "expected the same tokens at every layer, got layers that lack some. Choose layers: table[table.layer.isin(...)]."
        )
    values = np.stack([part[columns].to_numpy(float) for part in parts], 1)  # [tokens, layers, scores]
    there = np.isfinite(values)
    scales = np.zeros((len(layers), len(columns), 2))
    for place in range(len(columns)):
        signed = _two_signed(values[..., place])
        for at in range(len(layers)):
            scales[at, place] = middle_and_bound(values[:, at, place], 0.0 if signed else None)
    shown = _filled(values - scales[..., 0])
    texts = [visible(token, bool(known.any()), bool(known.all())) for token, known in zip(parts[0]["token"], there, strict=True)]
    # CircuitsVis takes the extremes shown as the ends of the colors: two boxes make them symmetric, and show what they look like.
    texts, shown = [*texts, *_ENDS], np.concatenate([shown, np.stack([-scales[..., 1], scales[..., 1]])])
    drawn = text_neuron_activations(
        texts, shown, "Layer", "Score", [str(layer) for layer in layers], [f"{name} [{unit}]" for name, unit in units.items()]
    ).local_src
    span = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    where = f"{span}, sequence {seq} ({rows['doc'].iloc[0]})"
    caption = (
        f"{', '.join(columns)} at {where}. White is the middle of the score at the layer, blue above it, red below; hover shows "
        "the difference from it in the score's unit. Gray and underlined: no score at all; underlined: no score at some layer or "
        "of some kind, where it shows 0. The last two boxes are the ends of the scale."
    )
    some = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int))
    words = [shown_text(token) for token in parts[0]["token"]]
    still = [
        ColoredText(f"{columns[0]}, layer {layers[at]}", words, (values[:, at, 0] - scales[at, 0, 0]) / scales[at, 0, 1])
        for at in some
    ]
    return _assemble(drawn, [caption], f"{', '.join(columns)}, {where}", still, _scales(layers, units, scales, there))


# In the picture of a saved notebook: the first score at so many of the layers.
_MOST_LAYERS = 4


@dataclass(frozen=True)
class _Scales:
    """What white and the ends of the colors are: names of the scores, and for each layer its cells, three to a score."""

    names: list[str]
    layers: dict[int, list[str]]


def _scales(layers: Sequence[int], units: dict[str, str], scales: np.ndarray, there: np.ndarray) -> _Scales:
    cells = {
        layer: [
            text
            for (middle, bound), known in zip(scales[at], there[:, at].T, strict=True)
            for text in (f"{middle:.3g}", f"{bound:.3g}", str(int((~known).sum())))
        ]
        for at, layer in enumerate(layers)
    }
    return _Scales([f"{name} [{unit}]" for name, unit in units.items()], cells)


# Tags without attributes, for the reason given in `visible`; unlike tokens, in small italics.
_ENDS = ("<small>lowest</small>", "<small>highest</small>")


def middle_and_bound(values: Float[np.ndarray, " tokens"], middle: float | None = None) -> tuple[float, float]:
    """What is white, and how far from it the colors end: 0 for both signs, else the median; never of no width."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    if middle is None:
        middle = 0.0 if _two_signed(known) else float(np.median(known))
    return middle, float(np.abs(known - middle).max()) or 1.0


def _two_signed(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() < 0 < known.max())


def _filled(values: np.ndarray) -> np.ndarray:
    # One NaN would take the color from all tokens.
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _units(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, str]:
    tables.require(table, *columns, "seq", "token")
    if not columns:
        raise TableError(f"expected at least one score, got none; the table has {list(tables.scores(table))}.")
    if base := marks.compared(table):
        pairs = ("difference", f"{base}_a", f"{base}_b")
        if other := [name for name in columns if name not in pairs]:
            raise TableError(f"expected columns of `compare` among {list(pairs)}, got {other[0]!r}.")
        return dict.fromkeys(columns, marks.unit_of(table, base))
    if table["run"].nunique() != 1:
        raise TableError(f"expected a table of one run, got {table['run'].nunique()}. Choose one: table[table.run == ...].")
    facts = tables.scores(table)
    for name in columns:
        if name not in facts:
            raise TableError(f"expected a score, got {name!r}; the table has {list(facts)}.")
    return {name: str(facts[name]["unit"]) for name in columns}


def _sequence(rows: pd.DataFrame, table: pd.DataFrame, seq: int | None) -> tuple[pd.DataFrame, int]:
    seq = int(rows["seq"].iloc[0]) if seq is None else seq
    rows = rows[rows["seq"] == seq].sort_values("pos", kind="stable")
    if rows.empty:
        raise TableError(f"expected a sequence of the table, got {seq}; it has 0 to {table['seq'].max()}.")
    return rows, seq


def _assemble(
    drawn: str, captions: Sequence[str], title: str, still: Sequence[ColoredText], scales: _Scales | None = None
) -> TokenView:
    """A view from CircuitsVis' own markup, with its script apart."""
    head, rest = drawn.split('<script crossorigin type="module">', 1)
    start, end = rest.index("CircuitsVis.render("), rest.rindex("</script>")
    element = head.split('id="', 1)[1].split('"', 1)[0]
    # Names of scores are text within a script: "<" must not begin a tag there.
    call = rest[start:end].strip().replace("<", "\\u003c")
    body = render("tokens.html", captions=captions, element=element, scales=scales)
    return TokenView(body, within_script(call), within_script(rest[:start].strip()), title, tuple(still), element)


def visible(token: str, scored: bool, everywhere: bool = True) -> str:
    """Token text as harmless HTML (CircuitsVis writes it into the page as it is), with line ends and empty tokens made visible."""
    text = escape(shown_text(token))
    # CircuitsVis turns every space into &nbsp;, so the tag can have no attributes: the style is set beside it.
    return str(Markup("<em>%s</em>") % text if not scored else text if everywhere else Markup("<i>%s</i>") % text)


def shown_text(token: str) -> str:
    """Token text with line ends, tabs and an empty token made visible."""
    return token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥") or "∅"
