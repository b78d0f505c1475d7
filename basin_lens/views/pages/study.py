"""The page of a study: what was asked, what was found, and why not to believe it, in one offline file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views.pages.cells import Cell, ReadableTable, cell, readable_table
from basin_lens.views.pages.page import Picture, Report, page_of, picture, render
from basin_lens.views.tokens import TokenView

_FLAG_WORDS = {True: ("yes", "▲ RAISED"), False: ("no", "no"), None: ("unknown", "? not checked")}
_LAST = (
    ("provenance", "Provenance"),
    ("hypothesis", "Hypothesis, declared before looking"),
    ("verdict", "Verdict"),
    ("flags", "Red flags"),
    ("untested", "What was not tested"),
)


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
    provenance: Mapping[str, object],
) -> Report:
    """One self-contained page of a study.

    The verdict and the count of red flags stand right below the title; the page ends with provenance (folded), the hypothesis as
    declared before looking, the verdict, the red flags, and what was not tested. Figures are images in the page; tables of more
    than 30 rows are folded. It can be printed: folded parts open.

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
        TableError: flags without the columns `flag`, `raised` and `why`, or without a row.

    Example:
        >>> import basin_lens as bl
        >>> page = bl.views.study_page(
        ...     "A study", about=["Of nothing."], sections=[bl.views.Section("Nothing")], hypothesis="There is something.",
        ...     verdict="There is not.", flags=None, not_tested=["Everything else."], provenance={"seed": 0},
        ... )
        >>> "There is not." in page.html
        True
    """
    views = [section.view for section in sections if section.view is not None]
    return page_of(
        "study.html",
        title=title,
        subtitle=subtitle,
        about=_list(about),
        sections=[_shown(section) for section in sections],
        last=dict(_LAST),
        hypothesis=_list(hypothesis),
        verdict=_list(verdict),
        flags=None if flags is None else _flags(flags),
        not_tested=_list(not_tested),
        provenance=json.dumps(provenance, indent=1, default=str, ensure_ascii=False),
        # CircuitsVis once, however many views there are.
        scripts={code: [view.call for view in views if view.script == code] for code in (view.script for view in views) if code},
    )


def study_card(
    title: str,
    *,
    subtitle: str,
    decision: str,
    verdict: Sequence[str],
    flags: pd.DataFrame | None,
    figure: Figure | None,
    last: str,
) -> str:
    """A study as a piece of HTML for a notebook: verdict, red flags raised, one figure. All texts are escaped.

    Args:
        title, subtitle, decision, verdict, flags: as for `study_page`; `decision` in one word.
        figure: shown below; None: none.
        last: a line at the end.
    """
    return str(
        render(
            "card.html",
            title=title,
            subtitle=subtitle,
            decision=decision[:1].upper() + decision[1:],
            verdict=list(verdict),
            flags_said=flags_said(flags),
            raised=[]
            if flags is None
            else [f"{row['flag']}: {row['why']}" for row in flags.to_dict("records") if _is_raised(row["raised"])],
            picture=None if figure is None else picture(figure, title),
            last=last,
        )
    )


def flags_said(flags: pd.DataFrame | None) -> str:
    """How many red flags are raised, and how many could not be checked, in words."""
    if flags is None:
        return "no red flags were computed"
    raised = sum(_is_raised(one) for one in flags["raised"])
    unknown = int(flags["raised"].isna().sum())
    return f"{raised} of {len(flags)} red flags raised" + (f", {unknown} not checked" if unknown else "")


def _is_raised(value: object) -> bool:
    return value is not None and value is not pd.NA and bool(value)


@dataclass(frozen=True)
class _Shown:
    """A `Section` as the template takes it."""

    title: str
    text: list[str]
    picture: Picture | None
    caption: list[str]
    view: TokenView | None
    table: ReadableTable | None
    note: list[str]


def _shown(section: Section) -> _Shown:
    drawn = None
    if section.figure is not None:
        alt = f"{section.title}. {section.caption}" if section.caption else section.title
        drawn = picture(section.figure, alt, section.caption)
    return _Shown(
        title=section.title,
        text=_list(section.text),
        picture=drawn,
        caption=[section.caption] if section.caption and drawn is None else [],
        view=section.view,
        table=None if section.table is None else readable_table(section.table),
        note=[section.note] if section.note else [],
    )


def _list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


@dataclass(frozen=True)
class _Flag:
    """A row of the table of red flags: `kind` is its class in the page, `word` says whether it is raised."""

    kind: str
    word: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Flags:
    """The red flags of a study. `numbers`: what is behind them."""

    raised: int
    unknown: int
    head: tuple[Cell, ...]
    rows: tuple[_Flag, ...]
    numbers: ReadableTable | None


def _flags(flags: pd.DataFrame) -> _Flags:
    tables.require(flags, "flag", "raised", "why")
    if flags.empty:
        raise TableError("expected at least one red flag, raised or not, got none. Pass flags=None if none were computed.")
    raised = [None if pd.isna(one) else bool(one) for one in flags["raised"]]
    also = [name for name in ("study", "question", "score", "layer") if name in flags and flags[name].notna().any()]
    names = ("flag", *also, "why")
    rows = [
        _Flag(*_FLAG_WORDS[one], tuple(cell(row[name], name, at_right=name == "layer") for name in names))
        for one, (_, row) in zip(raised, flags.iterrows(), strict=True)
    ]
    rest = [name for name in flags.columns if name not in ("why", "raised")]
    return _Flags(
        raised=raised.count(True),
        unknown=raised.count(None),
        head=tuple(Cell(name, "n" if name == "layer" else "") for name in ("raised", *names)),
        rows=tuple(rows),
        numbers=readable_table(flags[rest]) if set(rest) - {"flag", "study", "question", "score", "layer"} else None,
    )
