"""Texts as token windows of one length, and what a merger costs on them."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basin_lens.capture.passes import token_losses
from basin_lens.errors import MergeError
from basin_lens.merging.hook import TokenMerger
from basin_lens.model import device_of, forward_pass, measuring, n_context
from basin_lens.texts import read_passages, tokenize
from basin_lens.texts.copies import SHARE, groups_of_copies, made_of_runs, runs_of
from basin_lens.values import whole_numbers

TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length.

    `doc`: the document of each. `source`: a hash of the whole document's text, if it is known. `pieces`: whether `doc` are pieces of
    documents.
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
        """Every window as a document of its own, for texts that are too few: less independent than documents are, and to be said."""
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

        A document of which half of the windows are known is known in full: of a text that was trained on, some tokens were in no window.
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
def windows_of(model: Any, data: Any, length: int, *, most: int | None = None) -> Windows:
    """Cut texts into windows of exactly `length` tokens (BOS counted, if the model uses one); what is left at a text's end is not used.

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
    return Windows(
        torch.tensor([found[i].tokens for i in order]), tuple(docs[i] for i in order), tuple(source[i] for i in order)
    )  # fmt: skip


def seen_of(windows: Windows) -> str:
    """The runs of tokens in some windows, so that copies are known again: numbers of 8 bytes each, in base 64."""
    return base64.b64encode(np.unique(runs_of(windows.tokens.numpy())).astype("<i8").tobytes()).decode("ascii")


def without_seen(windows: Windows, training: Mapping[str, Any]) -> tuple[Windows, int]:
    """Windows that a merger was not trained on, nearly or in full, by what it says of its training; and how many others there were."""
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


@dataclass(frozen=True)
class Plain:
    """What the plain model says of some windows: losses, most likely tokens; log probabilities pass by pass, in float16."""

    losses: Float[Tensor, "batch predicted"]
    best: Int[Tensor, "batch pos"]
    logits: tuple[Tensor, ...]


def plain_pass(model: Any, windows: Windows, *, keep: bool = True) -> Plain:
    """Losses (nats) and, with `keep`, the logits of the model without merging; 2 bytes x vocabulary per token of memory.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> tuple(bl.merging.plain_pass(model, windows, keep=False).losses.shape)
        (4, 31)
    """
    losses, best, logits = [], [], []
    with measuring(model):
        for rows in batches(windows):
            tokens = windows.tokens[rows].to(device_of(model))
            made = forward_pass(model, tokens, {})
            losses.append(token_losses(made, tokens))
            best.append(made.argmax(-1))
            if keep:
                logits.append(made.log_softmax(-1).half())
    return Plain(torch.cat(losses), torch.cat(best), tuple(logits))


def excess(
    merger: TokenMerger, model: Any, windows: Windows, plain: Plain, *, context: int | None = None,
    scores: Mapping[int, Float[Tensor, "batch pos"]] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """What merging costs, window by window, on the same tokens.

    Args:
        merger: calibrated or trained.
        model: a hooked model.
        windows: texts that the merger was neither calibrated nor trained on.
        plain: of the same windows, with logits.
        context: the protocol of that name: only tokens behind that place count.
        scores: see `TokenMerger.attached`.

    Returns:
        a row per window: `doc`, `window`, `excess` (nats per token: mean of -log p merged less plain), `excess_easy` and `excess_hard` (halves of
        the tokens by the plain model's surprisal), `kl` (nats per token, plain to merged), `agreement` (share of equal most likely
        tokens), `seconds` (of the merged pass, per token), `bytes_share` (of the full cache at the window's end, all layers), `rate`
        (merged / tokens, mean over merged layers), `same_id` (share of merges between
        identical token ids; NaN without merges or for rules that drop). Time, bytes, rate and same ids are those of the pass that the window was
        in, a few windows together. `merger.statistics()` then holds all passes.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20], target_rate=0.3, projection=16).calibrate(model, windows.tokens)
        >>> found = bl.merging.excess(merger, model, windows, bl.merging.plain_pass(model, windows))
        >>> len(found), bool((found.bytes_share < 1).all())
        (4, True)
    """
    rows: list[dict[str, Any]] = []
    merger.forget()
    for part, kept in zip(batches(windows), plain.logits, strict=True):
        tokens = windows.tokens[part].to(device_of(model))
        before = plain.losses[part]
        given = None if scores is None else {layer: value[part] for layer, value in scores.items()}
        surprisal = as_surprisal(before) if merger.options.preserve == "surprisal" else None
        with merger.attached(model, context=context, scores=given, surprisal=surprisal), torch.no_grad():
            begun = time.perf_counter()
            logits = forward_pass(model, tokens, {})
            logits[0, 0, 0].item()  # waits for the device
            spent = (time.perf_counter() - begun) / tokens.numel()
            same = _same_ids(merger, tokens)
        after = token_losses(logits, tokens)
        said = logits.log_softmax(-1)
        was = kept.float()
        kl = (was.exp() * (was - said)).sum(-1)[:, :-1]
        agree = (plain.best[part] == logits.argmax(-1))[:, :-1].float()
        held = merger.statistics()
        held = held[held["pass"] == held["pass"].max()]
        left = share_left(merger, held)
        first = 0 if context is None else context - 1
        hard = before > before[:, first:].median(dim=1, keepdim=True).values
        for b in range(len(tokens)):
            change = (after - before)[b, first:]
            rows.append({
                "doc": windows.doc[part.start + b], "window": part.start + b, "excess": float(change.mean()), "seconds": spent,
                "excess_easy": float(change[~hard[b, first:]].mean()), "excess_hard": float(change[hard[b, first:]].mean()),
                "kl": float(kl[b, first:].mean()), "agreement": float(agree[b, first:].mean()), "bytes_share": left,
                "rate": float(held["rate"].mean()), "same_id": same,
            })  # fmt: skip
    return pd.DataFrame(rows)


def share_left(merger: TokenMerger, statistics: pd.DataFrame) -> float:
    """Bytes of the cache, all layers, over those of the full cache."""
    full = float(statistics["full_bytes"].mean())
    plain = merger.n_layers - len(merger.options.layers)
    return (float(statistics.groupby("layer")["bytes"].mean().sum()) + plain * full) / (merger.n_layers * full)


def _same_ids(merger: TokenMerger, tokens: Int[Tensor, "batch pos"]) -> float:
    assert merger.pass_ is not None
    same = count = 0
    for found in merger.pass_.assigned.values():
        chosen: Bool[Tensor, "batch pos"] = found.joined & (found.leader >= 0)
        same += int((tokens.gather(1, found.leader.clamp(min=0)) == tokens)[chosen].sum())
        count += int(chosen.sum())
    return same / count if count else float("nan")


def surprisal_for(merger: TokenMerger, model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"] | None:
    """What `TokenMerger.attached` and `calibrate` need to preserve surprising tokens, nats, by a plain pass; None if it preserves none.

    Example:
        >>> import basin_lens as bl
        >>> model = bl.load_model()
        >>> tokens = model.to_tokens("The lamp hums, and the lamp hums in the wind.")
        >>> merger = bl.merging.TokenMerger([20], threshold=0.5, recent=4, preserve="surprisal")
        >>> given = bl.merging.surprisal_for(merger, model, tokens)
        >>> merger.calibrate(model, tokens, surprisal=given).calibrated
        True
    """
    if merger.options.preserve != "surprisal":
        return None
    with measuring(model):
        return as_surprisal(token_losses(forward_pass(model, tokens, {}), tokens))


def as_surprisal(losses: Float[Tensor, "batch predicted"]) -> Float[Tensor, "batch pos"]:
    """Each token's own loss in its place; 0 for the first, which nothing predicts."""
    return torch.nn.functional.pad(losses, (1, 0))


def fit_budget(
    merger: TokenMerger, model: Any, windows: Windows, share: float, *, tolerance: float = 0.01, context: int | None = None
) -> float:
    """Move all thresholds together until `share` of the cache is left on these windows; what layers differ by is kept.

    Texts that nothing is tested on. `context`: the protocol of that name, see `TokenMerger.attached`.

    Returns:
        the share that was reached.

    Raises:
        MergeError: no threshold reaches it, or the rule has none.

    Example:
        >>> import basin_lens as bl
        >>> from basin_lens.texts import reference_passages
        >>> model = bl.load_model()
        >>> windows = bl.merging.windows_of(model, list(reference_passages()), 32, most=4)
        >>> merger = bl.merging.TokenMerger([20, 21], threshold=0.5).calibrate(model, windows.tokens)
        >>> abs(bl.merging.fit_budget(merger, model, windows, 0.98) - 0.98) < 0.02
        True
    """
    if not merger.options.learned:
        raise MergeError(f"expected thresholds to move, got rule {merger.options.rule!r}. Calibrate with target_bytes instead.")
    begun = merger.raw.detach().clone()

    def reached(shift: float) -> float:
        with torch.no_grad():
            merger.raw.copy_(begun + shift)
        merger.forget()
        for rows in batches(windows):
            tokens = windows.tokens[rows].to(device_of(model))
            surprisal = surprisal_for(merger, model, tokens)
            with merger.attached(model, context=context, surprisal=surprisal), torch.no_grad():
                forward_pass(model, tokens, {})
        found = share_left(merger, merger.statistics())
        merger.forget()
        return found

    # Outwards in growing steps, then by halves: budgets are seldom far.
    shift, found = 0.0, reached(0.0)
    side = 1.0 if found < share else -1.0
    near, step = 0.0, 0.5
    while abs(found - share) > tolerance and (share - found) * side > 0 and step <= 8:
        near, shift = shift, side * step
        found, step = reached(shift), 2 * step
    far = shift
    for _ in range(8):
        if abs(found - share) <= tolerance:
            return found
        shift = (near + far) / 2
        found = reached(shift)
        near, far = (shift, far) if (share - found) * side > 0 else (near, shift)
    if abs(found - share) > 0.02:
        with torch.no_grad():
            merger.raw.copy_(begun)
        raise MergeError(
            f"expected thresholds that leave {share:.2f} of the cache, got {found:.2f} at best. Merge in more layers, lower the floor, or ask "
            "for more."
        )
    return found
