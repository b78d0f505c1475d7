"""What must be held fixed before a score says anything new: token frequency, position, norm, density, surprisal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd

from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.stats.design import Rows, WhichLayers, check_run, constant, names_of, numbers, split
from basin_lens.stats.projection import level, unexplained
from basin_lens.stats.remembering import sharing
from basin_lens.tables.distinct import documents_once

# name: (column it is made of, whether as a logarithm)
_MADE_OF = {
    "log_radius": ("radius", True),
    "log_norm": ("state_norm", True),
    "log_frequency": ("token_id", True),
    "position": ("pos", False),
    "surprisal": ("surprisal", False),
    "same_token_share": ("same_token_share", False),
}
CONTROLS = tuple(_MADE_OF)
# Counts or shares of tokens, by id or by string.
Frequency = Mapping[int, float] | Mapping[str, float]
T = TypeVar("T")


def add_controls(table: pd.DataFrame, *, frequency: Frequency | None = None) -> pd.DataFrame:
    """Write the standard controls as columns: `log_radius, log_norm, log_frequency, position, surprisal, same_token_share`.

    Only those whose source the table has (`radius, state_norm, token_id, pos, surprisal, same_token_share`). Natural logarithms; of
    0: NaN.

    Args:
        table: from `analyze`, of one run.
        frequency: counts or shares by `token_id` or by token string, for instance from a large corpus; tokens that it lacks are
            NaN. None: a token's share of the tokens of this table, copies of a text counted once.

    Returns:
        a copy with the columns added.

    Raises:
        TableError: several runs, or a table that has none of the sources.

    Example:
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> table = pd.DataFrame({"doc": "a", "seq": 0, "pos": [0, 1, 2, 3], "token_id": [5, 6, 5, 5]})
        >>> bl.stats.add_controls(table).log_frequency.round(2).tolist()
        [-0.29, -1.39, -0.29, -0.29]
    """
    check_run(table)
    if not any(source in table.columns for source, _ in _MADE_OF.values()):
        raise TableError(
            f"expected at least one of {[s for s, _ in _MADE_OF.values()]}, got {list(table.columns)}. Measure them too."
        )
    answer = table.copy()
    for name, (source, logarithm) in _MADE_OF.items():
        if source not in table.columns or (name in table.columns and name != source):
            continue
        values = _frequency(table, frequency) if name == "log_frequency" else numbers(table, source)
        if logarithm:
            values = np.log(np.where(values > 0, values, np.nan))
        answer[name] = values
    return answer


def _frequency(table: pd.DataFrame, given: Frequency | None) -> np.ndarray:
    if given is None:
        # A token stands once per layer, the same number of times for all: the shares are those of the texts.
        counts = table["token_id"].value_counts()
        if {"doc", "seq"} <= set(table.columns):
            # A copied text says nothing new of how frequent its tokens are. What only copies have, such as a title, is counted
            # there.
            once = table["token_id"][documents_once(table).keep].value_counts()
            counts = once.reindex(counts.index).fillna(counts) if len(once) else counts
        return table["token_id"].map(counts / counts.sum()).to_numpy(float)
    by_string = bool(given) and isinstance(next(iter(given)), str)
    column = "token" if by_string else "token_id"
    tables.require(table, column)
    return table[column].map(dict(given)).to_numpy(float)


@dataclass(frozen=True)
class Controlled:
    """A table with its control columns, their names, and a note on those of the standard that are not there."""

    table: pd.DataFrame
    names: list[str]
    note: str


def chosen(table: pd.DataFrame, controls: Sequence[str], own: Sequence[str], frequency: Frequency | None) -> Controlled:
    """A table with the controls that were asked for.

    A control made of a tested column is left out: nothing would remain of it.

    Raises:
        TableError: a control that is neither in the table nor standard.
    """
    if not len(controls):
        return Controlled(table, [], "")
    asked = names_of(controls, "controls")
    known = [c for c in asked if c in _MADE_OF and (c in table.columns or _MADE_OF[c][0] in table.columns)]
    with_them = add_controls(table, frequency=frequency) if known else table
    tables.require(with_them, *(c for c in asked if c not in _MADE_OF))
    there, absent, same = [], [], []
    for name in asked:
        if name in own or (name in _MADE_OF and _MADE_OF[name][0] in own):
            same.append(name)
        elif name in with_them.columns:
            there.append(name)
        else:
            absent.append(name)
    notes = [f"not in the table, so not controlled: {', '.join(absent)}"] if absent else []
    if same:
        notes.append(f"tested itself, so not controlled: {', '.join(same)}")
    return Controlled(with_them, there, "; ".join(notes))


@dataclass(frozen=True)
class Selection:
    """What tests with controls take alike: what they hold fixed, at which layers they test, and over which units."""

    controls: Sequence[str]
    frequency: Frequency | None
    layers: WhichLayers
    unit: str

    def given(self, table: pd.DataFrame, own: Sequence[str]) -> Controlled:
        """The table with the controls of a test of these columns."""
        return chosen(table, self.controls, own, self.frequency)

    def split(self, table: pd.DataFrame, columns: Sequence[str], labels: Sequence[str] = ()) -> Iterator[Rows]:
        """The rows of each layer."""
        return split(table, columns, layers=self.layers, unit=self.unit, labels=labels)


def by_layer(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    selection: Selection,
    test: Callable[[Rows, tuple[str, str], list[str], str], T],
) -> list[T]:
    """A test of each pair at each layer, in this order; done layer by layer, because the pairs of a layer share their controls.

    `test` takes the rows where all columns are finite, the pair, the names of its controls, and the note on those that are not
    there.
    """
    held = [selection.given(table, pair) for pair in pairs]
    columns = [name for pair, given in zip(pairs, held, strict=True) for name in (*pair, *given.names)]
    found: list[list[T]] = [[] for _ in pairs]
    for every in selection.split(held[0].table, columns):
        for answers, pair, given in zip(found, pairs, held, strict=True):
            answers.append(test(every.finite(*pair, *given.names), pair, given.names, given.note))
    return [answer for answers in found for answer in answers]


def varied(rows: Rows, controls: Sequence[str]) -> tuple[list[str], str]:
    """The controls that vary over these rows, and a note on the others."""
    flat = [name for name in controls if constant(rows.values[name])]
    return [name for name in controls if name not in flat], f"constant here, so not controlled: {', '.join(flat)}" if flat else ""


@sharing()
def residuals(
    table: pd.DataFrame,
    scores: str | Sequence[str],
    *,
    controls: Sequence[str] = CONTROLS,
    frequency: Frequency | None = None,
    within: bool = True,
    smooth: bool = True,
) -> pd.DataFrame:
    """Replace scores by what the controls do not explain, layer by layer; any test of no effect can follow.

    What is compared with them, such as groups of tokens, goes with the controls too: of its effect, their share is gone with
    theirs. Of how large an effect is at fixed controls, `compare_groups(controls=)` and `partial_correlation` tell, which take them
    out of both.

    Args:
        table: from `analyze`, of one run.
        scores: columns to replace.
        controls: standard controls (those that the table lacks are passed over) or columns of the table.
        frequency: as for `add_controls`.
        within: fit within sequences (scores and controls less their sequence means), and keep the score's sequence means; False:
            over all tokens of the layer, and keep its mean.
        smooth: take out a smooth function of each control (see `basin_lens.stats.projection.curves`) besides a straight line: a
            confound that bends would leave a difference otherwise. Where tokens are too few for that, straight lines alone.

    Returns:
        a copy of the table. Rows where a score or control is NaN become NaN, or infinite where one is; those of copies of other
        texts become NaN. `attrs["controls"]`: what was controlled, by score.

    Raises:
        TableError: several runs, missing columns, or a table with none of the controls.

    Source: Frisch and Waugh 1933.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> import basin_lens as bl
        >>> pos = np.arange(8)
        >>> table = pd.DataFrame({"doc": "a", "seq": 0, "pos": pos, "score": 2.0 * pos + [1, -1, -1, 1, 1, -1, -1, 1]})
        >>> bl.stats.residuals(table, "score", controls=["position"]).score.round(6).tolist()
        [8.0, 6.0, 6.0, 8.0, 8.0, 6.0, 6.0, 8.0]
    """
    names = names_of(scores)
    tables.require(table, *names)
    answer = table.copy()
    used: dict[str, list[str]] = {}
    for score in names:
        given = chosen(table, controls, [score], frequency)
        there = used[score] = given.names
        if not there:
            raise TableError(f"expected a table with at least one control, got none ({given.note}). Measure them, or name columns.")
        bare = given.table.reset_index(drop=True)
        bare["_row"] = np.arange(len(bare), dtype=float)
        made = np.full(len(bare), np.nan)
        for every in split(bare, [score, *there, "_row"]):
            rows = every.finite(score, *there)
            endless = np.isinf(np.stack([every.values[name] for name in (score, *there)])).any(0)
            made[every.values["_row"][endless].astype(int)] = np.inf  # so that the test that follows counts them
            if not len(rows.sequence):
                continue
            codes = rows.sequence if within else np.zeros(len(rows.sequence), int)
            values = rows.values[score]
            left, _ = unexplained(values[:, None], [rows.values[c] for c in there], codes, smooth=smooth)
            # Of what the controls explain in full, rounding is left.
            made[rows.values["_row"].astype(int)] = level(codes, values) + (left.values[:, 0] if left.of(0) else 0.0)
        answer[score] = made
    return tables.noted(answer, controls=used)
