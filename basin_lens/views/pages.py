"""The page of a study: what was asked, what was found, and why not to believe it, in one offline file."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views import marks
from basin_lens.views.report import Report
from basin_lens.views.tokens import TokenView

_LONG = 30  # rows, from which a table is folded
_WIDE = 8  # columns, from which those that say the same in every row leave the table
_DPI = 150
_PROBABILITY = re.compile(r"(^|_)p(_corrected)?$|^p_|(^|_)p_value$")
_FLAG_WORDS = {True: ("yes", "▲ RAISED"), False: ("no", "no"), None: ("unknown", "? not checked")}


@dataclass(frozen=True)
class Section:
    """One part of a study page. What is given is shown in this order: text, figure with its caption, view, table, note.

    Without a figure, the caption stands above the view or table.
    """

    title: str
    text: str | Sequence[str] = ()
    figure: Figure | None = None
    caption: str = ""
    table: pd.DataFrame | None = None
    view: TokenView | None = None
    note: str = ""


def study_page(
    title: str,
    *,
    subtitle: str = "",
    about: Sequence[str],
    sections: Sequence[Section],
    hypothesis: str | Sequence[str],
    verdict: str | Sequence[str],
    flags: pd.DataFrame | None,
    not_tested: Sequence[str],
    provenance: Mapping[str, Any],
) -> Report:
    """One self-contained page of a study.

    The verdict and the count of red flags stand right below the title; the page ends with provenance (folded), the hypothesis as declared
    before looking, the verdict, the red flags, and what was not tested. Figures are images in the page; tables of more than 30 rows
    are folded. It can be printed: folded parts open.

    Args:
        title: heading of the page.
        subtitle: a line below it.
        about: paragraphs: what was measured, on what.
        sections: the findings, in order.
        hypothesis: what was expected, written before the results were looked at; a paragraph or several.
        verdict: what came out; a paragraph or several.
        flags: from `basin_lens.stats.red_flags`; None: none were computed, and the page says so.
        not_tested: what a reader might think was tested.
        provenance: what is needed to do it again; anything that JSON takes, other things as text.

    Returns:
        a `Report` with `.html` and `.save(path)`. All texts are data in it, never markup.

    Raises:
        TableError: flags without the columns `flag`, `raised` and `why`.

    Example:
        >>> import basin_lens as bl
        >>> page = bl.views.study_page(
        ...     "A study", about=["Of nothing."], sections=[bl.views.Section("Nothing")], hypothesis="There is something.",
        ...     verdict="There is not.", flags=None, not_tested=["Everything else."], provenance={"seed": 0},
        ... )
        >>> "There is not." in page.html
        True
    """
    raised = None if flags is None else _raised(flags)
    parts = {
        "TITLE": html.escape(title),
        "SUBTITLE": f'<p class="soft">{html.escape(subtitle)}</p>' if subtitle else "",
        "TOP": _top(verdict, raised),
        "ABOUT": _paragraphs(about),
        "CONTENTS": _contents(sections),
        "SECTIONS": "\n".join(_section(index, section) for index, section in enumerate(sections)),
        "PROVENANCE": html.escape(json.dumps(provenance, indent=1, default=str, ensure_ascii=False)),
        "HYPOTHESIS": _paragraphs(hypothesis),
        "VERDICT": _paragraphs(verdict),
        "FLAGS": _flag_table(flags, raised),
        "UNTESTED": f"<ul>{''.join(f'<li>{html.escape(one)}</li>' for one in _list(not_tested))}</ul>"
        if not_tested
        else "<p>Nothing was named.</p>",
        "SCRIPTS": _scripts([section.view for section in sections if section.view is not None]),
    }
    page = (resources.files("basin_lens") / "views" / "study.html").read_text(encoding="utf-8")
    # One pass over the template: what looks like a place in a text is left alone.
    return Report(re.sub(r"__([A-Z]+)__", lambda found: parts[found[1]], page))


def _list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _paragraphs(texts: str | Sequence[str], kind: str = "") -> str:
    return "".join(f"<p{kind}>{html.escape(text)}</p>" for text in _list(texts))


def _top(verdict: str | Sequence[str], raised: Sequence[bool | None] | None) -> str:
    if raised is None:
        words = "Red flags: none computed"
    else:
        words = f"Red flags: {raised.count(True)} of {len(raised)} raised" + (
            f", {raised.count(None)} not checked" if raised.count(None) else ""
        )
    alarm = " raised" if raised and any(raised) else ""
    return (
        f'<div class="verdict{alarm}"><b class="name">Verdict</b>{_paragraphs(verdict)}'
        f'<p class="soft"><a href="#flags">{words}</a> · <a href="#hypothesis">Hypothesis</a> · <a href="#untested">What was not tested</a></p></div>'
    )


def _contents(sections: Sequence[Section]) -> str:
    last = {
        "provenance": "Provenance",
        "hypothesis": "Hypothesis, declared before looking",
        "verdict": "Verdict",
        "flags": "Red flags",
        "untested": "What was not tested",
    }
    entries = {f"s{index}": section.title for index, section in enumerate(sections)} | last
    return "".join(f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for anchor, title in entries.items())


def _section(index: int, section: Section) -> str:
    parts = [f'<section><h2 id="s{index}">{html.escape(section.title)}</h2>', _paragraphs(section.text)]
    if section.figure is not None:
        parts.append(_figure(section.figure, section.title, section.caption))
    elif section.caption:
        parts.append(_paragraphs(section.caption, ' class="soft"'))
    if section.view is not None:
        parts.append(section.view.body)
    if section.table is not None:
        parts.append(table_html(section.table))
    if section.note:
        parts.append(_paragraphs(section.note, ' class="note"'))
    return "".join(parts) + "</section>"


def _figure(figure: Figure, title: str, caption: str) -> str:
    drawn = io.BytesIO()
    # Without the version of matplotlib in the file, the same figure is the same page.
    figure.savefig(drawn, format="png", dpi=_DPI, metadata={"Software": None}, facecolor="white")
    width, height = (round(96 * side) for side in figure.get_size_inches())
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img width="{width}" height="{height}" alt="{html.escape(f"{title}. {caption}" if caption else title)}" '
        f'src="data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}">{below}</figure>'
    )


def _scripts(views: Sequence[TokenView]) -> str:
    """CircuitsVis once, however many views there are."""
    if not views:
        return ""
    scripts = list(dict.fromkeys(view.script for view in views))
    return "\n".join(
        f'<script type="module">{script}\n' + "\n".join(view.call for view in views if view.script == script) + "</script>"
        for script in scripts
    )


def _raised(flags: pd.DataFrame) -> list[bool | None]:
    tables.require(flags, "flag", "raised", "why")
    return [None if pd.isna(one) else bool(one) for one in flags["raised"]]


def _flag_table(flags: pd.DataFrame | None, raised: Sequence[bool | None] | None) -> str:
    if flags is None or raised is None:
        return "<p>No red flags were computed for this study. That is not the same as none being there.</p>"
    if flags.empty:
        raise TableError("expected at least one red flag, raised or not, got none. Pass flags=None if none were computed.")
    also = [name for name in ("study", "question", "score", "layer") if name in flags and flags[name].notna().any()]
    head = "".join(f"<th{' class=n' if name == 'layer' else ''}>{name}</th>" for name in ("raised", "flag", *also, "why"))
    lines = []
    for one, (_, row) in zip(raised, flags.iterrows(), strict=True):
        kind, word = _FLAG_WORDS[one]
        cells = "".join(_data(_cell(row[name], name), name == "layer") for name in ("flag", *also, "why"))
        lines.append(f'<tr class="{kind}"><td><span class="flag {kind}">{word}</span></td>{cells}</tr>')
    answer = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    rest = [name for name in flags.columns if name not in ("why", "raised")]
    if set(rest) - {"flag", "study", "question", "score", "layer"}:
        answer += f"<details><summary>The numbers behind the flags</summary>{table_html(flags[rest])}</details>"
    return answer


def table_html(table: pd.DataFrame) -> str:
    """A table to read: four digits, p-values as such, yes and no, an en dash for what is missing; folded if it is long.

    In a wide table, columns that are the same in every row are a sentence above it.
    """
    if table.index.nlevels > 1 or table.index.name is not None:
        table = table.reset_index()
    columns = [table.iloc[:, place] for place in range(table.shape[1])]
    above = ""
    if len(table) > 2 and len(columns) > _WIDE:
        same = [column for column in columns if column.astype(str).nunique() == 1]
        columns = [column for column in columns if column.astype(str).nunique() > 1] or columns
        words = [f"{html.escape(str(column.name))} {_cell(column.iloc[0], str(column.name))}" for column in same]
        above = f'<p class="soft">In every row: {"; ".join(words)}.</p>' if words and len(columns) < table.shape[1] else ""
    numeric = [pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column) for column in columns]
    head = "".join(
        f"<th{' class=n' if right else ''}>{html.escape(str(column.name))}</th>"
        for column, right in zip(columns, numeric, strict=True)
    )
    cells = [
        [_data(_cell(value, str(column.name)), right) for value in column.astype(object)]
        for column, right in zip(columns, numeric, strict=True)
    ]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    if len(table) <= _LONG:
        return f'{above}<div class="wide">{inner}</div>'
    summary = f"Table of {len(table):,} rows and {table.shape[1]} columns"
    return f'<details><summary>{summary}</summary>{above}<div class="tall">{inner}</div></details>'


def _data(shown: str, right: bool) -> str:
    kind = ' class="n"' if right else ' class="long"' if len(shown) > 40 else ""
    return f"<td{kind}>{shown}</td>"


def _cell(value: Any, name: str) -> str:
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        return html.escape(str(value))
    if pd.isna(value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace("-", "−")
    if isinstance(value, float | np.floating):
        return html.escape(marks.probability(float(value)) if _PROBABILITY.search(name) else marks.number(float(value), 4))
    return html.escape(str(value)) or "–"
