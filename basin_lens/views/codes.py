"""Texts as a codec sees them: tokens by bits and by rank on an offline page, and sizes beside other compressors."""

import html
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from basin_lens.errors import TableError
from basin_lens.views import marks
from basin_lens.views.report import Report

_NEEDED = ("token", "rank", "probability", "bits", "top", "top_probability")
_BITS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # upper edges of the color steps: doubling, as on a log scale
_RANKS = (0, 1, 3, 9, 31, 99, 999)
_SHADES = ("#ffffff", "#fff3d6", "#ffe1a8", "#fdc87a", "#f7a456", "#ea7b41", "#d1512f", "#a62a1f")  # darker: more bits
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SPACES = {" ": "·", "\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body{{font-family:system-ui,sans-serif;margin:2rem auto;max-width:56rem;padding:0 1rem;color:#1b1b1b;background:#fff}}
h1,td{{overflow-wrap:anywhere}}h1{{font-size:1.4rem}}h2{{font-size:1.1rem;margin-top:2rem}}.note,figcaption,table{{color:#444;font-size:.9rem}}
.text{{white-space:pre-wrap;font-family:ui-monospace,monospace;line-height:1.9;overflow-wrap:anywhere}}
.text span{{border-radius:2px;padding:.1em 0;border-bottom:1px solid #ddd}}.text span:focus,.text span:hover{{outline:2px solid #0072B2}}
.text i{{color:#767676;font-style:normal}}.dark i{{color:inherit;opacity:.75}}
.key{{line-height:1.9}}.key span{{padding:.1rem .5rem;border:1px solid #ccc}}
td{{padding:.1rem .8rem .1rem 0}}
svg{{max-width:100%;height:auto}}{shades}</style></head><body>
<h1>{title}</h1>{summary}
<h2>Where the bits go</h2><input type="radio" name="by" id="by-bits" checked><label for="by-bits">by bits</label>
<input type="radio" name="by" id="by-rank"><label for="by-rank">by rank</label>
<p class="key by-bits">bits: {key_bits}</p><p class="key by-rank">rank (0: the first choice): {key_rank}</p>
<p class="note">Rest on a token for its bits, probability, rank and what the model expected. Spaces are shown as · and line ends as ⏎;
� is a part of a character.</p>
<div class="text">{tokens}</div>{parts}
<p class="note">By one full pass over the text. The weights of the model are not counted; famous text was probably seen in training.</p>
</body></html>"""


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
    parts = []
    if growth is not None:
        parts.append(f"<h2>Size along the text</h2><figure>{_lines(growth)}<figcaption>Bytes of the compressed prefix against bytes of "
                     "the prefix; the model's are the ideal, without header.</figcaption></figure>")  # fmt: skip
    law = "" if zipf is None else " Line: the fitted power law."
    parts.append(
        f"<h2>Ranks</h2><figure>{_histogram(table['rank'].to_numpy(), zipf)}<figcaption>Share of tokens with a rank in each range "
        f"(logarithmic), from 0 on.{law}</figcaption></figure>"
    )
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in (facts or {}).items())
    shades = "".join(
        f"#by-{by}:checked~.text .{by[0]}{step}{{background:{shade};color:{'#fff' if step >= 6 else '#1b1b1b'}}}"
        for by in ("bits", "rank")
        for step, shade in enumerate(_SHADES)
    )
    shades += "#by-bits:checked~.by-rank,#by-rank:checked~.by-bits{display:none}"
    page = _PAGE.format(
        title=html.escape(title), summary=f"<table>{rows}</table>" if rows else "", shades=shades, key_bits=_key(_BITS, "≤ "),
        key_rank=_key(_RANKS, "≤ "), tokens="".join(map(_token, table.to_dict("records"))), parts="".join(parts),
    )  # fmt: skip
    return Report(page)


def size_bars(table: pd.DataFrame, *, column: str = "bits_per_byte", title: str = "Bits per byte") -> Figure:
    """Sizes of one text under several coders, smallest first; those of the model in another color and hatched.

    Args:
        table: one row per coder: `coder`, `kind` ("model" or "general") and `column`; as from `basin_lens.codec.bench`.
        column: what is drawn.
        title: heading.

    Raises:
        TableError: a column is missing, or nothing to draw.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> sizes = pd.DataFrame({"coder": ["direct", "xz -9e"], "kind": ["model", "general"], "bits_per_byte": [1.0, 2.5]})
        >>> type(bl.views.size_bars(sizes)).__name__
        'Figure'
    """
    missing = [name for name in ("coder", "kind", column) if name not in table]
    if missing:
        raise TableError(f"expected columns coder, kind and {column}, got none of {missing}. Use basin_lens.codec.bench.")
    shown = table.dropna(subset=[column]).sort_values(column, kind="stable", ascending=False)
    if shown.empty:
        raise TableError(f"expected a size to draw, got no value in {column}.")
    figure = Figure(figsize=(7, 0.34 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    own = (shown["kind"] == "model").tolist()
    bars = axes.barh(
        [marks.plain(name) for name in shown["coder"]], shown[column], color=[marks.COLORS[0] if mine else "#c8ccd0" for mine in own],
        hatch=["//" if mine else "" for mine in own], edgecolor="#ffffff",
    )  # fmt: skip
    axes.bar_label(bars, [f"{value:.3f}" for value in shown[column]], padding=3, fontsize=8)
    axes.set_xlabel(marks.plain(column.replace("_", " ")))
    axes.set_title(marks.plain(title, 90), loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _token(row: Mapping[Hashable, Any]) -> str:
    rank, bits, expected = row["rank"], row["bits"], zip(row["top"], row["top_probability"], strict=True)
    lines = [f"{bits:.2f} bits, p = {row['probability']:.2g}, rank {rank}", *(f"{p:.3f}  {name!r}" for name, p in expected)]
    step = int(np.searchsorted(_BITS, bits)), int(np.searchsorted(_RANKS, rank))
    shown = "".join(map(_character, row["token"])) or "<i>∅</i>"
    note = html.escape("\n".join(lines), quote=True).replace("\n", "&#10;")
    return f'<span class="b{step[0]} r{step[1]}{" dark" if max(step) >= 6 else ""}" title="{note}">{shown}</span>'


def _character(character: str) -> str:
    if character in _SPACES:
        return f"<i>{_SPACES[character]}</i>{'<wbr>' * (character == ' ')}"  # lines break between words, as they would at a space
    if character < " ":
        return f"<i>{chr(0x2400 + ord(character))}</i>"
    # What has no width or turns the direction of writing would hide, or reorder the text beside it.
    return html.escape(character) if character.isprintable() else f"<i>{ascii(character)[1:-1]}</i>"


def _key(edges: Sequence[float | int], sign: str) -> str:
    names = [*(f"{sign if edge else ''}{edge:g}" for edge in edges), f"&gt; {edges[-1]:g}"]
    return " ".join(
        f'<span style="background:{shade};color:{"#fff" if step >= 6 else "#1b1b1b"}">{name}</span>'
        for step, (shade, name) in enumerate(zip(_SHADES, names, strict=True))
    )


def _lines(growth: pd.DataFrame) -> str:
    coders = [name for name in growth if name != "original"]
    right, top = float(growth["original"].max()) or 1.0, float(growth[coders].to_numpy().max()) or 1.0
    parts = [_word(40, 12, f"{top:,.0f} bytes compressed")]
    ends = _apart([230 - 210 * float(growth[name].iloc[-1]) / top for name in coders])
    for index, (name, end) in enumerate(zip(coders, ends, strict=True)):
        points = " ".join(
            f"{40 + 500 * x / right:.1f},{230 - 210 * y / top:.1f}" for x, y in zip(growth["original"], growth[name], strict=True)
        )
        color, dashes = marks.COLORS[index % len(marks.COLORS)], ("none", "6 3", "2 3")[index % 3]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
                     f'<text x="545" y="{end + 4:.1f}" font-size="12">{html.escape(str(name))} {growth[name].iloc[-1]:,.0f}</text>')  # fmt: skip
    return _drawing("sizes along the text", [*parts, _word(540, 248, f"{right:,.0f} bytes of text", "end")])


def _apart(places: Sequence[float], least: float = 14.0) -> list[float]:
    """Heights of labels in the same order from above, no two closer than `least`; the highest stays where it is."""
    moved, above = list(places), -float("inf")
    for index in sorted(range(len(moved)), key=moved.__getitem__):
        moved[index] = above = max(moved[index], above + least)
    return moved


def _word(x: float | int, y: float | int, text: str, anchor: str = "start") -> str:
    halo = 'paint-order="stroke" stroke="#fff" stroke-width="3"'  # readable over a line
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="10" text-anchor="{anchor}" {halo}>{text}</text>'


def _histogram(ranks: np.ndarray, zipf: np.ndarray | None) -> str:
    most = max(int(ranks.max()), 1)
    edges = np.unique([0, *(2**power for power in range(most.bit_length() + 1))])
    shares = np.histogram(ranks, [*edges[:-1], edges[-1]])[0] / len(ranks)
    law = [] if zipf is None else [float(zipf[low:high].sum()) for low, high in itertools.pairwise(edges)]
    wide, full = 500 / len(shares), max(*shares, *law)
    bars, words, line = [], [_word(40, 12, "share of tokens"), _word(545, 244, "rank")], []
    for index, share in enumerate(shares):
        low, high = int(edges[index]), int(edges[index + 1]) - 1
        x, top = 40 + wide * index, 230 - 200 * share / full
        name = str(low) if low == high else f"{low}+" if low < 1024 else f"2{str(low.bit_length() - 1).translate(_RAISED)}+"
        bars.append(
            f'<rect x="{x + 2:.1f}" y="{top:.1f}" width="{wide - 4:.1f}" height="{230 - top:.1f}" fill="{marks.COLORS[0]}"/>'
        )
        words += [_word(x + wide / 2, 244, name, "middle"), _word(x + wide / 2, top - 4, f"{share:.1%}", "middle")]
        line += [f"{x + wide / 2:.1f},{230 - 200 * part / full:.1f}" for part in law[index : index + 1]]
    if line:
        bars.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{marks.COLORS[1]}" stroke-width="2"/>')
    return _drawing("shares of ranks", [*bars, *words])


def _drawing(what: str, parts: Sequence[str]) -> str:
    axis = '<path d="M40 20V230H540" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 640 252" role="img" aria-label="{what}" xmlns="http://www.w3.org/2000/svg">{axis}{"".join(parts)}</svg>'
    )
