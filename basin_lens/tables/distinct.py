"""Which rows of a table are of copied texts, so that whoever counts texts counts each once.

Copies are found where texts are measured (`basin_lens.texts.copies`) and kept in provenance. A table that was made by hand, or
whose texts were put together anew, has no such record of them: there they are found in its own tokens, where all of a sequence's
tokens are there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from basin_lens.tables.frame import runs
from basin_lens.texts.copies import closed_groups, groups_of_copies
from basin_lens.values import Facts

# Documents of several texts are one unit where copies make up this share of the shorter: a book's edition, not a line that many
# have in common.
SHARE_OF_DOCUMENT = 0.1
_found: dict[bytes, list[list[int]]] = {}  # the last groups found in tables' own tokens: every test asks again
_MOST_FOUND = 8
_NAMES = ("doc", "seq", "passage")
_WHOLE = 32  # tokens; so many in a row are a text, from wherever on they stand there
_FEWEST = 5  # tokens; shorter pieces in a table without a record may be what is left of other texts, and are alike by chance


@dataclass(frozen=True)
class Once:
    """Every text once: which rows to keep, and what the rows belong to where copies count as one.

    Attributes:
        sequence: code of each row's sequence.
        keep: False for the rows of texts that another one stands for.
        units, documents: codes of each row; documents that share copies have one code.
        folds: the same for splits: no copies in two of them, whatever their labels.
        n_texts, n_copies: texts of the table, and those that are copies of others.
        note: in words; empty without copies.
    """

    sequence: Int[np.ndarray, " rows"]
    keep: Bool[np.ndarray, " rows"]
    units: Int[np.ndarray, " rows"]
    documents: Int[np.ndarray, " rows"]
    folds: Int[np.ndarray, " rows"]
    n_texts: int
    n_copies: int
    note: str


def once(
    table: pd.DataFrame,
    sequence: Int[np.ndarray, " rows"],
    document: Int[np.ndarray, " rows"],
    units: Int[np.ndarray, " rows"],
    unit: str = "document",
    labels: Sequence[str] = (),
) -> Once:
    """Every text of the table once.

    Of a group of copies, one stands for all. Copies with different labels, or in different units where units are a label, are all
    kept: they may be what is compared.

    Args:
        table: with `doc` and `seq`.
        sequence, document, units: codes of each row, from 0.
        unit: what `units` are: `"document"`, `"sequence"` or a label.
        labels: columns that a test tells texts apart by; those that change within a sequence do not count.
    """
    first = np.unique(sequence, return_index=True)[1]
    text = _texts(table, sequence, document)[first]
    group, rank = _copies(table, sequence, first)
    n_texts = len(np.unique(text))
    if (group < 0).all():
        return Once(sequence, np.ones(len(sequence), bool), units, document, units, n_texts, 0, "")
    # Names and numbers of texts tell no kinds of texts apart: a copy has others.
    apart = [
        name for name in (*labels, *([unit] if unit not in (*_NAMES, "document", "sequence") else [])) if name in table.columns
    ]
    alike = _split_by(table, sequence, first, group, apart)
    stands, any_stands = _standing(alike, rank), _standing(group, rank)
    sizes = np.bincount(sequence)
    documents = _joined(document, document[first], sizes, stands)
    dropped = stands != np.arange(len(first))
    copied = any_stands != np.arange(len(first))
    n_copies, left_out = len(np.unique(text[copied])), len(np.unique(text[dropped]))
    note = f"{left_out} of {n_texts} texts are copies of others and left out" if left_out else ""
    if n_copies > left_out:
        what = f"under another {' or '.join(apart)}" if apart else "elsewhere"
        note += f"{'; ' if note else ''}{n_copies - left_out} of {n_texts} texts are copies of texts {what}, and kept"
    return Once(
        sequence,
        keep=~dropped[sequence],
        units=documents if unit in ("document", "doc") else units,
        documents=documents,
        folds=_joined(units, units[first], sizes, any_stands),
        n_texts=n_texts,
        n_copies=n_copies,
        note=note,
    )


def codes_of(table: pd.DataFrame) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Codes of the sequence and of the document of each row."""
    sequence = table.groupby(["doc", "seq"], sort=True, dropna=False).ngroup().to_numpy()
    return sequence, pd.factorize(table["doc"], use_na_sentinel=False)[0]


def documents_once(table: pd.DataFrame) -> Once:
    """Every text of the table once, documents as units, whatever the labels."""
    sequence, document = codes_of(table)
    return once(table, sequence, document, document)


def _texts(table: pd.DataFrame, sequence: np.ndarray, document: np.ndarray) -> Int[np.ndarray, " rows"]:
    """Codes of passages; of sequences, where a table does not tell which passage they are of."""
    if "passage" not in table.columns:
        return sequence
    passage = pd.factorize(table["passage"], use_na_sentinel=False)[0]
    return np.unique(document * (passage.max() + 1) + passage, return_inverse=True)[1].reshape(-1)


def _copies(table: pd.DataFrame, sequence: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group of copies of each sequence (-1: of none), and its place in it: the first stands for the others."""
    group, rank = np.full(len(first), -1), np.zeros(len(first), int)
    names = table["seq"].to_numpy()[first]
    record = recorded(table)
    if record is not None and _is_of(record, names):
        place = {int(name): code for code, name in enumerate(names)}
        for number, members in enumerate(record["groups"]):
            for order, member in enumerate(members):
                for name in member["sequences"]:
                    if name in place:
                        group[place[name]], rank[place[name]] = number, order
    else:
        for number, members in enumerate(_found_in(table, sequence)):
            for order, codes in enumerate(members):
                group[codes], rank[codes] = number, order
    return group, rank


def recorded(table: pd.DataFrame) -> Facts | None:
    """What provenance says of copies among the table's texts; None if nothing."""
    known = runs(table)
    there = table["run"].unique().tolist() if "run" in table.columns else list(known)
    records = [known[run].copies for run in there if run in known]
    return next((record for record in records if record is not None), None)


def _is_of(record: Facts, names: np.ndarray) -> bool:
    """Whether the sequences are those that were looked through: a table put together anew numbers others, or some twice."""
    return bool(
        names.dtype.kind in "iu" and len(np.unique(names)) == len(names) and names.min() >= 0 and names.max() < record["sequences"]
    )


def _found_in(table: pd.DataFrame, sequence: np.ndarray) -> list[list[np.ndarray]]:
    """Groups of copies by the table's own tokens at one layer, as the sequence codes of each member.

    Only of sequences whose tokens are all there, from the first or second on (or many in a row), and not a few: of chosen tokens,
    two texts may have the same.
    """
    if not {"token_id", "pos"} <= set(table.columns):
        return []
    at = np.arange(len(table))
    if "layer" in table.columns:
        layers = table["layer"].to_numpy()
        at = np.flatnonzero(layers == layers[0])
    tokens, pos = (_whole_numbers(table[name].iloc[at]) for name in ("token_id", "pos"))
    if tokens is None or pos is None:
        return []
    order = np.lexsort((pos, sequence[at]))
    at, tokens, pos = at[order], tokens[order], pos[order]
    codes, starts, sizes = np.unique(sequence[at], return_index=True, return_counts=True)
    steps = np.where(np.r_[True, np.diff(sequence[at]) != 0], 1, np.diff(pos, prepend=0))
    whole = np.logical_and.reduceat(steps == 1, starts) & (sizes >= np.where(pos[starts] <= 1, _FEWEST, _WHOLE))
    real = np.ones(len(at), bool)
    if "start" in table.columns:
        # BOS has no place in the text.
        offsets = table["start"].to_numpy()[at]
        real = (offsets >= 0) | np.repeat(np.maximum.reduceat(offsets, starts) < 0, sizes)
    texts: dict[object, list[np.ndarray]] = {}
    keys = (
        table[["doc", "passage"] if "passage" in table.columns else ["doc", "seq"]]
        .iloc[at[starts]]
        .itertuples(index=False, name=None)
    )
    pieces = np.split(tokens, starts[1:])
    reals = np.split(real, starts[1:])
    held: list[list[int]] = []
    members: list[list[int]] = []
    for key, code, is_whole, piece, is_real in zip(keys, codes.tolist(), whole.tolist(), pieces, reals, strict=True):
        if not is_whole:
            continue
        index = texts.setdefault(key, [])
        if not index:
            index.append(np.array(len(held)))
            held.append([])
            members.append([])
        held[int(index[0])] += piece[is_real].tolist()
        members[int(index[0])].append(code)
    strings = None
    if "token" in table.columns and held:
        ids, where = np.unique(tokens, return_index=True)
        strings = dict(zip(ids.tolist(), table["token"].iloc[at[where]].astype(str), strict=True))
        if 2 * len(set(strings.values())) < len(strings):  # stand-ins, not the tokens' own text: the ids tell
            strings = None
    return [[np.array(members[index]) for index in group] for group in _remembered(held, strings)]


def _whole_numbers(column: pd.Series) -> Int[np.ndarray, " rows"] | None:
    """A column of whole numbers, of whatever type (read or joined with gaps, it may hold floats); None: others are in it."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if not pd.api.types.is_numeric_dtype(column.dtype):
        return None
    held = column.to_numpy(np.float64, na_value=np.nan)
    return held.astype(np.int64) if (np.isfinite(held) & (held == np.round(held))).all() else None


def _remembered(texts: list[list[int]], strings: dict[int, str] | None) -> list[list[int]]:
    key = hashlib.blake2b(np.array([len(text) for text in texts]).tobytes(), digest_size=16)
    for text in texts:
        key.update(np.array(text, np.int64).tobytes())
    key.update(repr(strings).encode("utf-8", "surrogatepass"))
    digest = key.digest()
    if digest not in _found:
        found = groups_of_copies(texts, strings)
        while len(_found) >= _MOST_FOUND:
            del _found[next(iter(_found))]
        _found[digest] = found
    return _found[digest]


def _split_by(
    table: pd.DataFrame, sequence: np.ndarray, first: np.ndarray, group: np.ndarray, names: Sequence[str]
) -> Int[np.ndarray, " sequences"]:
    """Groups of copies whose labels are the same too."""
    for name in names:
        codes = pd.factorize(table[name], use_na_sentinel=False)[0]
        if (codes != codes[first][sequence])[group[sequence] >= 0].any():
            continue
        pairs = np.unique(group * (codes.max() + 1) + codes[first], return_inverse=True)[1].reshape(-1)
        group = np.where(group >= 0, pairs, -1)
    return group


def _standing(group: np.ndarray, rank: np.ndarray) -> Int[np.ndarray, " sequences"]:
    """The sequence that stands for each: itself, unless it is of a copy of a text that is there."""
    stands = np.arange(len(group))
    order = np.lexsort((stands, rank, group))
    order = order[group[order] >= 0]
    begins = np.r_[True, np.diff(group[order]) != 0] if len(order) else np.empty(0, bool)
    leader = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))] if len(order) else order
    copied = rank[order] > rank[leader]
    stands[order[copied]] = leader[copied]
    return stands


def _joined(
    codes: Int[np.ndarray, " rows"], of_sequence: np.ndarray, sizes: np.ndarray, stands: np.ndarray
) -> Int[np.ndarray, " rows"]:
    """Codes where those that share copies are one, if the copies make up enough of the shorter."""
    total = np.bincount(of_sequence, weights=sizes)
    copied = stands != np.arange(len(stands))
    pairs = pd.DataFrame({"a": of_sequence[copied], "b": of_sequence[stands[copied]], "n": sizes[copied]})
    shared = pairs.groupby(["a", "b"], as_index=False)["n"].sum().to_numpy()
    close = shared[shared[:, 2] >= SHARE_OF_DOCUMENT * np.minimum(total[shared[:, 0]], total[shared[:, 1]])]
    return closed_groups(len(total), close[:, :2].tolist())[codes]
