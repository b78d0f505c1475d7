"""Texts as token windows of one length."""

import base64
import hashlib
import json
from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from basin_lens.errors import MergeError
from basin_lens.model import HookedModel, n_context
from basin_lens.texts import Texts, read_passages, tokenize
from basin_lens.texts.copies import SHARE, groups_of_copies, made_of_runs, runs_of
from basin_lens.values import Facts, whole_numbers

TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length.

    `doc`: the document of each. `source`: a hash of the whole document's text, if it is known. `pieces`: whether `doc` are pieces
    of documents.
    """

    tokens: Int[Tensor, "batch pos"]
    doc: tuple[str, ...]
    source: tuple[str, ...] = ()
    pieces: bool = False

    def __len__(self) -> int:
        return len(self.doc)

    def take(self, rows: list[int]) -> "Windows":
        """Some of them."""
        source = tuple(self.source[r] for r in rows) if self.source else ()
        return Windows(self.tokens[rows], tuple(self.doc[r] for r in rows), source, self.pieces)

    def in_pieces(self) -> "Windows":
        """Every window as a document of its own, for texts that are too few: less independent than documents are, and to be
        said.
        """
        count: dict[str, int] = {}
        for doc in self.doc:
            count[doc] = count.get(doc, 0) + 1
        turn = dict.fromkeys(count, 0)
        names = []
        for doc in self.doc:
            turn[doc] += 1
            names.append(f"{doc}, window {turn[doc]} of {count[doc]}")
        return Windows(self.tokens, tuple(names), self.source, True)

    def digests(self) -> list[str]:
        """A hash of each window's tokens, by which it is known again."""
        return [hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest() for row in self.tokens.tolist()]

    def without_copies_of(self, others: "Windows") -> tuple["Windows", int]:
        """Those that are no copies of the others, nearly or in full, and how many were; see `without_runs`."""
        return self.without_runs(np.unique(runs_of(others.tokens.numpy())), set(others.digests()))

    def without_runs(self, known: Int[np.ndarray, " runs"], equal: Set[str]) -> tuple["Windows", int]:
        """Those that are not made of known runs (of `runs_of`) nor have a known digest, and how many were.

        A document of which half of the windows are known is known in full: of a text that was trained on, some tokens were in no
            window.
        """
        copied = made_of_runs(self.tokens.numpy(), known) | np.array([digest in equal for digest in self.digests()], bool)
        share = pd.Series(copied).groupby(list(self.doc)).transform("mean").to_numpy(float)
        copied |= share >= SHARE
        return self.take(np.flatnonzero(~copied).tolist()), int(copied.sum())

    def once(self) -> tuple["Windows", int]:
        """One of those that are copies of one another, and how many others there were."""
        left_out = {row for group in groups_of_copies(self.tokens.tolist()) for row in group[1:]}
        return self.take([row for row in range(len(self)) if row not in left_out]), len(left_out)

    def apart(self, share: float) -> tuple["Windows", "Windows"]:
        """About this share of them, whole documents, from the first on; and the rest.

        Raises:
            MergeError: fewer than two documents.
        """
        docs = list(dict.fromkeys(self.doc))
        if len(docs) < 2:
            raise MergeError(f"expected windows of two documents or more to hold some out, got {len(docs)}. Give more texts.")
        count = {doc: self.doc.count(doc) for doc in docs}
        first: list[str] = []
        for doc in docs[:-1]:
            if first and sum(count[d] for d in first) >= share * len(self):
                break
            first.append(doc)
        rows = [i for i, doc in enumerate(self.doc) if doc in first]
        return self.take(rows), self.take([i for i in range(len(self)) if i not in set(rows)])


@whole_numbers(MergeError)
def windows_of(model: HookedModel, data: Texts, length: int, *, most: int | None = None) -> Windows:
    """Cut texts into windows of exactly `length` tokens (BOS counted, if the model uses one); what is left at a text's end is not
    used.

    Args:
        model: a hooked model with a tokenizer.
        data: texts as for `analyze`.
        length: tokens per window.
        most: at most so many, taken from the documents in turn.

    Raises:
        TextError: no tokens. MergeError: no text is that long, or the model's context is shorter.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> tuple(windows.tokens.shape)
        (4, 32)
    """
    if not 4 <= length <= n_context(model):
        raise MergeError(f"expected windows of 4 to {n_context(model)} tokens (the model's context), got {length}.")
    passages = read_passages(data)
    found = [s for s in tokenize(model, passages, max_length=length) if len(s.tokens) == length]
    if not found:
        raise MergeError(
            f"expected a text of {length} tokens or more, got {len(passages)} shorter ones. Give longer texts or a smaller length."
        )
    docs = [str(passages[s.passage].doc) if passages[s.passage].doc is not None else str(s.passage) for s in found]
    source = [text_digest(passages[s.passage].text) for s in found]
    order = list(range(len(found)))
    if most is not None and most < len(found):
        turn: dict[str, int] = {}
        key = []
        for doc in docs:
            turn[doc] = turn.get(doc, -1) + 1
            key.append(turn[doc])
        order = sorted(sorted(order, key=lambda i: (key[i], i))[:most])
    tokens = torch.tensor([found[i].tokens for i in order])
    return Windows(tokens, tuple(docs[i] for i in order), tuple(source[i] for i in order))


def seen_of(windows: Windows) -> str:
    """The runs of tokens in some windows, so that copies are known again: numbers of 8 bytes each, in base 64."""
    return base64.b64encode(np.unique(runs_of(windows.tokens.numpy())).astype("<i8").tobytes()).decode("ascii")


def without_seen(windows: Windows, training: Facts) -> tuple[Windows, int]:
    """Windows that a merger was not trained on, nearly or in full, by what it says of its training; and how many others there
    were.
    """
    known = np.frombuffer(base64.b64decode(training.get("seen_runs", "")), "<i8").astype(np.int64)
    return windows.without_runs(known, set(training.get("seen", [])))


def text_digest(text: str) -> str:
    """By which a whole text is known again."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def batches(windows: Windows) -> Iterator[slice]:
    """Rows of about 1,000 tokens."""
    size = max(1, TOKENS_PER_PASS // windows.tokens.shape[1])
    for start in range(0, len(windows), size):
        yield slice(start, min(start + size, len(windows)))
