"""Where a memorized path can be left: another continuation of the same prefix, and the true one behind a damaged prefix."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from basin_lens.capture.passes import TOKENS_PER_PASS, token_losses
from basin_lens.errors import StudyError
from basin_lens.memorize.extraction import DECODED_TOGETHER
from basin_lens.model import HookedModel, continuations, device_of, forward_pass, measuring


def continuation_loss(model: HookedModel, tokens: Int[Tensor, "batch pos"], first: int) -> Float[np.ndarray, " batch"]:
    """Mean -log p of the tokens from position `first` on, nats per token."""
    found = []
    with measuring(model):
        for part in tokens.split(max(1, TOKENS_PER_PASS // tokens.shape[1])):
            part = part.to(device_of(model))
            found.append(token_losses(forward_pass(model, part, {}), part)[:, first - 1 :].mean(1).cpu())
    return torch.cat(found).double().numpy()


def alternatives(
    base: HookedModel, tokens: Int[Tensor, "batch pos"], first: int, candidates: Sequence[Sequence[Sequence[int]]]
) -> tuple[Int[Tensor, "batch pos"], Float[np.ndarray, "batch two"]]:
    """For each sequence, the same prefix with that candidate continuation which the base model finds as likely as the true one.

    Args:
        base: the model before it memorized anything.
        tokens: true sequences.
        first: position where the continuation begins.
        candidates: for each sequence, continuations as long as the true one.

    Returns:
        the other sequences, and the base model's loss of the true and of the chosen continuation (nats per token).

    Raises:
        StudyError: candidates of another length.
    """
    length = tokens.shape[1] - first
    rows = []
    for row, others in zip(tokens, candidates, strict=True):
        if not others or any(len(other) != length for other in others):
            raise StudyError(
                f"expected candidate continuations of {length} tokens for each sequence, got {[len(o) for o in others][:8]}."
            )
        rows += [torch.cat([row[:first], torch.tensor(other, device="cpu")]) for other in others]
    own = continuation_loss(base, tokens, first)
    losses = continuation_loss(base, torch.stack(rows), first)
    chosen, found, at = [], [], 0
    for others, loss in zip(candidates, own, strict=True):
        best = at + int(np.argmin(np.abs(losses[at : at + len(others)] - loss)))
        chosen.append(rows[best])
        found.append([loss, losses[best]])
        at += len(others)
    return torch.stack(chosen), np.array(found)


def substituted(
    tokens: Int[Tensor, "batch pos"], first: int, edits: int, pool: Sequence[int], *, keep: int = 0, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """The sequences with `edits` tokens of the prefix replaced by others: so many substitutions away (no more, by edit distance).

    Places are drawn in one order per sequence, so that more edits damage a superset of the places that fewer do.

    Args:
        tokens: sequences.
        first: position where the prefix ends.
        edits: how many of its tokens to replace.
        pool: token ids to draw from.
        keep: so many tokens at the very beginning stay (BOS).
        seed: of places and tokens.

    Raises:
        StudyError: more edits than the prefix has tokens.
    """
    if not 0 <= edits <= first - keep or len(set(pool)) < 2:
        raise StudyError(
            f"expected at most {first - keep} edits (tokens of the prefix) and two tokens to draw from, got {edits}, "
            f"{len(set(pool))}."
        )
    changed = tokens.clone()
    for row in range(len(tokens)):
        rng = np.random.default_rng([seed, row])
        places = keep + rng.permutation(first - keep)
        for place in places[:edits].tolist():
            other = int(rng.choice(pool))
            while other == int(tokens[row, place]):
                other = int(rng.choice(pool))
            changed[row, place] = other
    return changed


def recited(model: HookedModel, tokens: Int[Tensor, "batch pos"], first: int) -> Float[np.ndarray, " batch"]:
    """Share of the continuation's positions at which greedy decoding behind the first `first` tokens writes the true token."""
    shares = []
    for part in tokens.split(max(1, DECODED_TOGETHER // tokens.shape[1])):
        written = continuations(model, part[:, :first], part.shape[1] - first)
        shares.append((written == part[:, first:]).double().mean(1))
    return torch.cat(shares).numpy()


def width(edits: Sequence[int], shares: Float[np.ndarray, "edits batch"], level: float = 0.5) -> Float[np.ndarray, " batch"]:
    """Edits at which a sequence's recited share falls below `level` first, by straight lines between the numbers of edits tried.

    0 if it is below without any edit, infinite if it never falls below.
    """
    answer = np.full(shares.shape[1], np.inf)
    for column, values in enumerate(shares.T):
        below = np.flatnonzero(values < level)
        if len(below) == 0:
            continue
        at = int(below[0])
        if at == 0:
            answer[column] = 0.0
            continue
        before, after = values[at - 1], values[at]
        answer[column] = edits[at - 1] + (edits[at] - edits[at - 1]) * (before - level) / (before - after)
    return answer
