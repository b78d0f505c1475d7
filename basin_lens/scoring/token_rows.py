"""Rows of a capture: which to score, how they group, what the table says of them."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Integer
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from basin_lens.capture import Capture
from basin_lens.errors import NeighborError
from basin_lens.texts.copies import groups_of_copies, whole_texts
from basin_lens.texts.passages import is_numbered
from basin_lens.values import Plain, truths_of, whole_or_none

_PLACES = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")


def query_rows(capture: Capture, queries: object, seed: int) -> Bool[Tensor, " rows"]:
    """Which rows to score.

    Raises:
        NeighborError: no name, number, mask or positions that choose a token.
    """
    if queries is None:
        return torch.ones(capture.n_rows, dtype=torch.bool, device="cpu")
    if isinstance(queries, str):
        return _named_rows(capture, queries)
    if (wanted := whole_or_none(queries)) is not None:
        return _sampled_rows(capture, wanted, seed)
    try:
        given = np.asarray(queries.cpu() if isinstance(queries, Tensor) else queries)
    except ValueError:  # lists of several lengths
        given = np.empty(0)
    positions = given.ndim == 1 or given.dtype.kind == "b"
    if given.dtype.kind not in "biu" or given.ndim == 0 or not given.size or not positions:
        raise NeighborError(f"expected queries as positions, a boolean mask, a name or a number, got {queries!r}.")
    mask = torch.tensor(given, device="cpu")  # a copy: columns of pandas cannot be written to, and torch warns of that
    return _masked_rows(capture, mask) if mask.dtype == torch.bool else _rows_at(capture, mask)


def _named_rows(capture: Capture, name: str) -> Bool[Tensor, " rows"]:
    """Rows of the texts with a label, or of the spans, of this name."""
    if any(name in label for label in capture.labels):
        truths = truths_of((label.get(name) for label in capture.labels), name, NeighborError)
        chosen = torch.tensor(truths, device="cpu")[capture.row_seq]
    else:
        chosen = torch.tensor([name in names for names in _spans(capture)], device="cpu")
    if not bool(chosen.any()):
        raise NeighborError(f"expected queries to name a label or span of the texts, got {name!r}, which marks no token.")
    return chosen


def _sampled_rows(capture: Capture, wanted: int, seed: int) -> Bool[Tensor, " rows"]:
    """A seeded sample of the rows beyond position 0."""
    if wanted < 1:
        raise NeighborError(f"expected a positive number of queries, got {wanted}.")
    rows = torch.nonzero(capture.row_pos > 0).squeeze(1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed % 2**63), device="cpu")
    chosen = torch.zeros(capture.n_rows, dtype=torch.bool, device="cpu")
    chosen[rows[order[:wanted]]] = True
    return chosen


def _masked_rows(capture: Capture, mask: Bool[Tensor, "..."]) -> Bool[Tensor, " rows"]:
    """Rows that a mask `[rows]` or `[seqs, pos]` marks."""
    if mask.shape not in ((capture.n_rows,), capture.valid.shape):
        raise NeighborError(
            f"expected a mask of shape {(capture.n_rows,)} or {tuple(capture.valid.shape)}, got {tuple(mask.shape)}."
        )
    chosen = mask.clone() if mask.ndim == 1 else mask[capture.valid]
    if not bool(chosen.any()):
        raise NeighborError("expected queries to mark at least one token, got a mask that marks none.")
    return chosen


def _rows_at(capture: Capture, positions: Integer[Tensor, " n"]) -> Bool[Tensor, " rows"]:
    """Rows at some positions of every sequence."""
    if int(positions.min()) < 0:
        raise NeighborError(
            f"expected positions from 0 on, got {int(positions.min())}. Count from the start of each sequence, or pass a mask."
        )
    chosen = torch.isin(capture.row_pos, positions.long())
    if not bool(chosen.any()):
        raise NeighborError(f"expected positions below {int(capture.lengths.max())}, got {positions.tolist()[:8]}.")
    return chosen


def documents_of_both(capture: Capture, bank: Capture) -> tuple[list[object], list[object]]:
    """The document of each sequence of a capture and of a bank, by names that are the same for the same document.

    A document that was given is the same wherever it is called so. One that was not given is called by its number, which says
    nothing in another capture: there it is one with every document that has a copy of one of its texts, however the two are cut.
    """
    named = [frozenset(source.settings.get("named_documents", ())) for source in (capture, bank)]
    given = [[not is_numbered(doc) or doc in names for doc in c.docs] for c, names in zip((capture, bank), named, strict=True)]
    if bank is capture or all(map(all, given)):
        return list(capture.docs), list(bank.docs)
    names: list[object] = [doc if own else (0, doc) for doc, own in zip(capture.docs, given[0], strict=True)]
    names += [doc if own else (1, doc) for doc, own in zip(bank.docs, given[1], strict=True)]
    texts = [text for side in texts_of_both(capture, bank) for text in side]
    of_unnamed = {text for text, own in zip(texts, [*given[0], *given[1]], strict=True) if not own}
    # Two given documents that share a text are still two, unless a text that nobody named is in both.
    shared = [text if text in of_unnamed else ("of", name) for name, text in zip(names, texts, strict=True)]
    documents = joined(names, shared)
    return list(documents[: len(capture.docs)]), list(documents[len(capture.docs) :])


def texts_of_both(capture: Capture, bank: Capture) -> tuple[list[int], list[int]]:
    """The text of each sequence of a capture and of a bank, in one numbering; copies are one text, however they are cut.

    Within one capture, equal sequences are one text, and nothing else is.
    """
    if bank is capture:
        known: dict[tuple[int, ...], int] = {}
        texts = [known.setdefault(sequence.tokens, len(known)) for sequence in capture.sequences]
        return texts, texts
    own, other = _whole_texts(capture, bank)
    numbers = _numbered_texts((*own, *other), tuple(sorted((capture.strings | bank.strings).items())))
    return [numbers[s.passage] for s in capture.sequences], [numbers[len(own) + s.passage] for s in bank.sequences]


def _sequences_of_both(capture: Capture, bank: Capture) -> tuple[list[object], list[object]]:
    """What each sequence of a capture and of a bank is, by names that are the same for the same sequence.

    In another capture, equal tokens are the same sequence. A text that is cut differently there (other lengths, another BOS) has
    no sequence in common with itself here, and is the same as a whole.
    """
    if bank is capture:
        return list(range(len(capture.sequences))), list(range(len(capture.sequences)))
    cuts: list[dict[tuple[int, ...], set[tuple[int, ...]]]] = [{}, {}]
    texts = [[whole[s.passage] for s in c.sequences] for c, whole in zip((capture, bank), _whole_texts(capture, bank), strict=True)]
    for source, of_each, cut in zip((capture, bank), texts, cuts, strict=True):
        for sequence, text in zip(source.sequences, of_each, strict=True):
            cut.setdefault(text, set()).add(sequence.tokens)
    whole = {text for text, own in cuts[0].items() if not (own <= cuts[1].get(text, own) or own >= cuts[1][text])}
    own, other = (
        [("text", text) if text in whole else sequence.tokens for sequence, text in zip(source.sequences, of_each, strict=True)]
        for source, of_each in zip((capture, bank), texts, strict=True)
    )
    return list(own), list(other)


def _whole_texts(capture: Capture, bank: Capture) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The tokens of each text of both without BOS, also where ids were given and nothing says which it is."""
    bos = {s.tokens[0] for c in (capture, bank) for s in c.sequences if max(s.starts) >= 0 > s.starts[0]}
    for source in (capture, bank):
        starts = {s.tokens[0] for s in source.sequences}
        if max(max(s.starts) for s in source.sequences) < 0 and len(starts) == 1 < len(source.sequences):
            bos |= starts  # ids, and every sequence begins with this one
    own, other = (
        [tuple(text[1:] if len(text) > 1 and text[0] in bos else text) for text in whole_texts(source.sequences)]
        for source in (capture, bank)
    )
    return own, other


@lru_cache(maxsize=2)  # one run asks several times, of one pair
def _numbered_texts(texts: tuple[tuple[int, ...], ...], strings: tuple[tuple[int, str], ...]) -> list[int]:
    """The number of each text; copies have one."""
    numbers = list(range(len(texts)))
    for group in groups_of_copies(texts, dict(strings)):
        for text in group:
            numbers[text] = min(group)
    return numbers


def joined(names: Sequence[object], texts: Sequence[object]) -> list[int]:
    """Numbers of things that have a name and a text each: the same where names or texts are, and so on through others."""
    by_name, by_text = (_numbers(values) for values in (names, texts))
    count = max(by_name) + 1
    size = count + max(by_text) + 1
    edges = sparse.coo_array((np.ones(len(by_name)), (by_name, count + np.array(by_text))), shape=(size, size))
    return csgraph.connected_components(edges, directed=False)[1][by_name].tolist()


def _numbers(values: Sequence[object]) -> list[int]:
    known: dict[object, int] = {}
    return [known.setdefault(value, len(known)) for value in values]


def row_groups(capture: Capture, bank: Capture, exclude: str) -> tuple[Tensor, Tensor]:
    """Group of each row of the capture and of the bank: a query's own group is never its neighbor."""
    if exclude in ("self", "nothing"):
        return torch.full((capture.n_rows,), -1, device="cpu"), torch.full((bank.n_rows,), -1, device="cpu")

    documents, sequences = documents_of_both(capture, bank), _sequences_of_both(capture, bank)

    def of(source: Capture) -> list[object]:
        if exclude == "sequence":
            return sequences[source is not capture]
        if exclude == "document":
            return documents[source is not capture]
        if source is capture and not any(exclude in label for label in source.labels):
            raise NeighborError(
                f'expected exclude "self", "sequence", "document" or a label of the texts, got {exclude!r}; labels: '
                f"{sorted({name for label in source.labels for name in label})}."
            )
        return [label.get(exclude) for label in source.labels]

    known: dict[object, int] = {}
    answers = []
    for source in (capture, bank):
        ids = [-1 if name is None else known.setdefault(name, len(known)) for name in of(source)]
        answers.append(torch.tensor(ids, device="cpu")[source.row_seq])
    return answers[0], answers[1]


def row_facts(capture: Capture) -> tuple[dict[str, Sequence[object] | np.ndarray], dict[str, list[Plain]]]:
    """Key columns and labels of each row."""
    seqs = capture.row_seq.tolist()
    rows: dict[str, Sequence[object] | np.ndarray] = {
        "passage": np.array([capture.sequences[s].passage for s in seqs]),
        "doc": [capture.docs[s] for s in seqs],
        "seq": capture.row_seq.numpy(),
        "pos": capture.row_pos.numpy(),
        "token_id": capture.row_token.numpy(),
        "token": capture.row_strings(),
        "start": np.array([start for s in capture.sequences for start in s.starts]),
        "end": np.array([end for s in capture.sequences for end in s.ends]),
        "span": ["+".join(names) for names in _spans(capture)],
    }
    names = dict.fromkeys(name for label in capture.labels for name in label)
    return rows, {name: [capture.labels[s].get(name) for s in seqs] for name in names}


def _spans(capture: Capture) -> list[list[str]]:
    """Names of the spans that each row's characters overlap."""
    if capture.passages is None:
        return [[] for _ in range(capture.n_rows)]
    return [
        [name for name, (a, b) in capture.passages[s.passage].spans.items() if start < b and a < end]
        for s in capture.sequences
        for start, end in zip(s.starts, s.ends, strict=True)
    ]


def places_of(rows: Bool[Tensor, " rows"]) -> str:
    """The rows marked, as text: `"3-7,12"`."""
    marked = np.flatnonzero(rows.cpu().numpy())
    runs = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1) if len(marked) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def rows_at_places(places: str, count: int) -> Bool[Tensor, " rows"]:
    """Of so many rows, those that `places_of` gave as text.

    Raises:
        ValueError: no such text, or a row beyond the last.
    """
    rows = torch.zeros(count, dtype=torch.bool, device="cpu")
    for part in places.split(","):
        found = _PLACES.fullmatch(part)
        begin, end = (int(found[1]), int(found[2] or found[1])) if found else (count, count)
        if not begin <= end < count:
            raise ValueError(f"row {part} of {count}")
        rows[begin : end + 1] = True
    return rows


def texts_hash(capture: Capture) -> str:
    return hashlib.blake2b(repr([s.tokens for s in capture.sequences]).encode(), digest_size=8).hexdigest()
