"""One full pass over a text: what each token would cost, and its rank. Nothing here is exact enough to decode from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from basin_lens.codec.lockstep import stream_lengths
from basin_lens.codec.ranks import rank_of
from basin_lens.model import HookedModel, device_of, forward_pass, measuring, start_token, vocabulary_size

_LOGITS_PER_PASS = 1 << 27  # float32: half a gigabyte


@dataclass(frozen=True)
class Estimate:
    """The ideal size of a text under a model: -log2 p of each token, without coder, header or rounding.

    `bits`: `[tokens]`, in bits, in [0, inf); `n_bytes`: of the text in UTF-8.
    """

    bits: Float[np.ndarray, " tokens"] = field(repr=False)
    n_bytes: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.bits)

    @property
    def total_bits(self) -> float:
        """Sum over the tokens."""
        return float(self.bits.sum())

    @property
    def bits_per_token(self) -> float:
        """Mean over the tokens; NaN without any."""
        return self.total_bits / self.n_tokens if self.n_tokens else float("nan")

    @property
    def bits_per_byte(self) -> float:
        """`total_bits` over the text's bytes; NaN without any."""
        return self.total_bits / self.n_bytes if self.n_bytes else float("nan")


@dataclass(frozen=True)
class Reading:
    """What a full pass shows of each token: all `[tokens]`, `top` and `top_probability` `[tokens, k]`."""

    bits: Float[np.ndarray, " tokens"]
    rank: Int[np.ndarray, " tokens"]
    entropy: Float[np.ndarray, " tokens"]  # of the prediction, in bits
    top: Int[np.ndarray, "tokens k"]  # token ids, most likely first
    top_probability: Float[np.ndarray, "tokens k"]


def read_pass(model: HookedModel, tokens: Int[np.ndarray, " n"], *, streams: int, window: int, k: int = 0) -> Reading:
    """Read a text as `streams` streams that start anew after `window` tokens, each opened by the start token.

    Args:
        model: a hooked model.
        tokens: the text's, `[n]`.
        streams: pieces that know nothing of one another.
        window: tokens, at most the model's context.
        k: how many of the most likely tokens to keep.
    """
    pieces = [
        piece[first : first + window]
        for piece in np.split(tokens, np.cumsum(stream_lengths(len(tokens), streams))[:-1])
        for first in range(0, len(piece), window)
    ]
    start, made = start_token(model), []
    size = max(1, _LOGITS_PER_PASS // (window * vocabulary_size(model)))
    with measuring(model):
        for at in range(0, len(pieces), size):
            some = pieces[at : at + size]
            given = np.full((len(some), max(map(len, some))), start, np.int64)
            for row, piece in zip(given, some, strict=True):
                row[1 : len(piece)] = piece[:-1]
            logits = forward_pass(model, torch.from_numpy(given).to(device_of(model)), {})
            made += [_of_piece(row[: len(piece)].float().cpu(), piece, k) for row, piece in zip(logits, some, strict=True)]
    return _joined(made, k)


def _of_piece(logits: torch.Tensor, piece: Int[np.ndarray, " n"], k: int) -> Reading:
    made = []
    for first in range(0, len(piece), 64):  # float64 of a wide vocabulary, a few rows at a time
        rows, own = logits[first : first + 64], piece[first : first + 64]
        logs = torch.log_softmax(rows.double(), dim=-1) / np.log(2.0)
        shares = logs.exp2()
        best = logs.topk(k, dim=-1)
        made.append(
            Reading(
                bits=-logs.gather(1, torch.from_numpy(own)[:, None])[:, 0].numpy(),
                rank=rank_of(rows.numpy(), own),
                entropy=-(shares * logs.clamp_min(-1e6)).sum(-1).numpy(),
                top=best.indices.numpy(),
                top_probability=best.values.exp2().numpy(),
            )
        )
    return _joined(made, k)


def _joined(made: Sequence[Reading], k: int) -> Reading:
    def join(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(reading, name) for reading in made)])

    return Reading(
        bits=join("bits", np.empty(0)),
        rank=join("rank", np.empty(0, np.int64)),
        entropy=join("entropy", np.empty(0)),
        top=join("top", np.empty((0, k), np.int64)),
        top_probability=join("top_probability", np.empty((0, k))),
    )
