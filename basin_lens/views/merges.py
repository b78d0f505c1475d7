"""Token merging as pictures: what it costs against what it saves, how training went, who merged into whom."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basin_lens.errors import TableError
from basin_lens.values import whole_numbers
from basin_lens.views import marks
from basin_lens.views.canvas import Canvas, drawn
from basin_lens.views.pages.page import render, within_script
from basin_lens.views.tokens import TokenView, shown_text

_MARKS = "oDs^vPX<>*hd"
_HUES = 12


@drawn
def pareto(
    results: pd.DataFrame,
    *,
    first: str = "trained",
    title: str | None = "Excess loss against bytes kept",
    labels: marks.Words = None,
    ax: Axes | None = None,
) -> Figure:
    """Cost against memory: a line per policy, 95 % intervals as bars.

    Args:
        results: `policy`, `bytes_share` (of the full cache), `estimate`, `low`, `high` (excess nats per token).
        first: the policy that is set off.
        title: above the figure; None: none.
        labels: words to show in place of names of policies.
        ax: matplotlib Axes to draw in; None: a new figure.

    Raises:
        TableError: a column is missing, or nothing to draw.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> rows = pd.DataFrame({"policy": ["trained"], "bytes_share": [0.5], "estimate": [0.1], "low": [0.05], "high": [0.2]})
        >>> type(bl.views.pareto(rows)).__name__
        'Figure'
    """
    needed = ("policy", "bytes_share", "estimate", "low", "high")
    if missing := [name for name in needed if name not in results]:
        raise TableError(f"expected columns {', '.join(needed)}, got none of {missing}.")
    if results.empty:
        raise TableError("expected a policy to draw, got none.")
    canvas = Canvas.of(ax, (7.4, 4.6))
    axes = canvas.axes()
    names = sorted(results["policy"].unique(), key=lambda name: (name != first, name))
    # A logarithm has no place for an interval that holds 0.
    lowest = float(results[["estimate", "low"]].to_numpy(float).min())
    positive = bool(lowest > 0) and results["estimate"].max() > 20 * results["estimate"].min()
    for place, name in enumerate(names):
        part = results[results["policy"] == name].sort_values("bytes_share")
        own = name == first
        # Side by side at equal bytes, or intervals would hide each other.
        shift = (place - len(names) / 2) * 0.0025
        low = (part["estimate"] - part["low"]).clip(lower=0).fillna(0)
        high = (part["high"] - part["estimate"]).clip(lower=0).fillna(0)
        axes.errorbar(
            part["bytes_share"] + shift,
            part["estimate"],
            yerr=[low, high],
            fmt=_MARKS[place % len(_MARKS)],
            capsize=2,
            linestyle="-" if place < len(marks.COLORS) else "--",
            color=marks.COLORS[place % len(marks.COLORS)],
            linewidth=2.2 if own else 1,
            markersize=6 if own else 4,
            label=marks.named(name, labels),
            zorder=3 if own else 2,
        )
    axes.axhline(0, color="#888", linewidth=0.8)
    if positive:
        axes.set_yscale("log")
    # One budget alone would be drawn as if its thousandths mattered.
    axes.set_xlim(results["bytes_share"].min() - 0.05, results["bytes_share"].max() + 0.05)
    axes.set_xlabel("bytes of the cache left / bytes of the full cache,\nindices and descriptors counted")
    axes.set_ylabel("excess loss, nats per token" + (" (log scale)" if positive else ""))
    axes.legend(fontsize=8, frameon=False, ncols=2)
    marks.bare(axes)
    return canvas.finish(title or "", "bars: 95 % interval; markers at equal bytes stand a little apart")


@drawn
def training_curves(
    history: pd.DataFrame, *, title: str | None = None, labels: marks.Words = None, ax: Axes | None = None
) -> Figure:
    """Threshold, merge rate, losses and parachute of a training, step by step.

    Args:
        history: of `basin_lens.merging.train_merger`.
        title: above the figure; None: none.
        labels: words to show in place of those of the legends and axes, such as `{"merged": "with merging"}`.
        ax: matplotlib Axes of a grid, whose place the panels take; None: a new figure.

    Raises:
        TableError: a column is missing, or no step.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> row = {"loss": 3.1, "plain_loss": 3.0, "excess": 0.1, "rate": 0.4, "target": 0.5, "level": 0.7, "offset": 0.0}
        >>> type(bl.views.training_curves(pd.DataFrame([{"step": 1, "event": None} | row]))).__name__
        'Figure'
    """
    needed = ("step", "loss", "plain_loss", "excess", "rate", "target", "level", "offset", "event")
    if missing := [name for name in needed if name not in history]:
        raise TableError(f"expected columns {', '.join(needed)}, got none of {missing}.")
    if history.empty:
        raise TableError("expected a step to draw, got none.")
    canvas = Canvas.of(ax, (9, 5.4), panels=True)
    panels = canvas.part.subplots(2, 2, sharex=True).ravel()
    step = history["step"]
    panels[0].plot(step, history["loss"], color=marks.COLORS[0], label="merged")
    panels[0].plot(step, history["plain_loss"], color="#888", linestyle="--", label="plain model, same batch")
    panels[0].set_ylabel("loss, nats per token")
    panels[1].plot(step, history["excess"], color=marks.COLORS[0], label="batch")
    if "held_out_excess" in history and history["held_out_excess"].notna().any():
        seen = history.dropna(subset=["held_out_excess"])
        panels[1].plot(seen["step"], seen["held_out_excess"], "D", color=marks.COLORS[1], label="held out")
    panels[1].axhline(0, color="#888", linewidth=0.8)
    panels[1].set_ylabel("excess, nats per token")
    panels[2].plot(step, history["rate"], color=marks.COLORS[0], label="merged / tokens")
    panels[2].plot(step, history["target"], color="#888", linestyle="--", label="target (one-sided)")
    panels[2].set_ylabel("merge rate, mean over layers")
    panels[3].plot(step, history["level"], color=marks.COLORS[0], label="threshold, mean over layers and tokens")
    panels[3].plot(step, history["offset"], color=marks.COLORS[1], label="parachute: part of the way to 1")
    for name, mark in (("back off", "v"), ("relax", "^")):
        at = history[history["event"] == name]
        if len(at):
            panels[3].plot(at["step"], at["offset"], mark, color="#444", label=f"event: {name}")
    panels[3].set_ylabel("cosine / share")
    for axes in panels[2:]:
        axes.set_xlabel("step")
    for axes in panels:
        handles, words = axes.get_legend_handles_labels()
        axes.legend(handles, [marks.named(word, labels) for word in words], fontsize=8, frameon=False)
        marks.bare(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_text(marks.named(axis.get_label_text(), labels) if axis.get_label_text() else "")
    return canvas.finish(title or "", "")


@whole_numbers(TableError)
def merge_view(table: pd.DataFrame, layer: int, *, seq: int = 0, tokens: Sequence[str] | None = None) -> TokenView:
    """Who merged into whom: tokens of one cluster in one color, merged ones underlined.

    On hover: the leader and the cluster's size.

    Args:
        table: `basin_lens.merging.merge_map`, with a column `token` (text) or `tokens` given.
        layer: the merged layer to show.
        seq: the sequence.
        tokens: the sequence's token texts.

    Raises:
        TableError: no such layer or sequence, or no texts.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"layer": 5, "seq": 0, "pos": [0, 1, 2], "leader": [0, 1, 1], "merged": [False, False, True],
        ...                       "cluster_size": [1, 2, 2]})
        >>> "merged into" in bl.views.merge_view(table, 5, tokens=["The", " lamp", " lamp"]).html
        True
    """
    rows = table[(table["layer"] == layer) & (table["seq"] == seq)].sort_values("pos")
    if rows.empty:
        raise TableError(f"expected a merged layer and a sequence of the map, got layer {layer}, sequence {seq}.")
    if tokens is None and "token" not in rows:
        raise TableError("expected token texts, got none. Give tokens=, or a column token.")
    texts = list(tokens) if tokens is not None else rows["token"].astype(str).tolist()
    clusters = {leader: i for i, leader in enumerate(rows.loc[rows["cluster_size"] > 1, "leader"].unique())}
    caption = (
        f"Layer {layer}: {int(rows['merged'].sum())} of {len(rows)} tokens merged. One color per cluster (colors repeat), the "
        "leader bold, members underlined; hover for who and where."
    )
    members = zip(*(rows[name].tolist() for name in ("pos", "merged", "leader", "cluster_size")), strict=True)
    shown = [
        {
            "text": shown_text(text),
            "said": _said(place, merged, leader, size, texts),
            "style": _style(bool(merged), clusters.get(leader)),
        }
        for (place, merged, leader, size), text in zip(members, texts, strict=True)
    ]
    body = render("merges.html", caption=caption, tokens=shown)
    return TokenView(body, within_script(""), within_script(""), f"Merges, layer {layer}")


def _said(place: int, merged: bool, leader: int, size: int, texts: Sequence[str]) -> str:
    """What is shown of a token on hover."""
    if merged:
        what = f"merged into {texts[leader]!r} at place {leader}; cluster of {size} tokens"
    elif size > 1:
        what = f"leader of a cluster of {size} tokens"
    else:
        what = "a row of its own"
    return f"place {place}: {what}"


def _style(merged: bool, cluster: int | None) -> str:
    """CSS of a token in the cluster of this number; None: in none."""
    ground = ""
    if cluster is not None:
        ground = f"color:#1b1b1b;background:hsl({cluster % _HUES * 360 // _HUES} 70% {88 - 8 * (cluster // _HUES % 3)}%);"
    return ground + ("text-decoration:underline;" if merged else "font-weight:600;" if cluster is not None else "")
