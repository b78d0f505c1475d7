"""Streams that advance together, one token each at every step: the same walk for the encoder and the decoder.

Determinism rests on it: the encoder computes nothing that the decoder does not compute with the same batch, the same cache at the
same place, and the same threads. A pass over the whole text would differ in the last digits, and so would another number of
streams.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from basin_lens.codec.entropy import RangeDecoder, RangeEncoder
from basin_lens.codec.probabilities import frequencies, quantize, uncertainty
from basin_lens.codec.rank_coders import RANK_CODERS, ZipfRanks, zipf
from basin_lens.codec.ranks import rank_of, token_of
from basin_lens.errors import CodecError
from basin_lens.model import Stepper

_FIRST_STEPS = 8  # of the probe


class TokenWriter(ABC):
    """Tokens -> bytes, given the model's prediction of each: a chunk is `put`... `finish`."""

    @abstractmethod
    def put(self, logits: Float[np.ndarray, "rows vocab"], tokens: Int[np.ndarray, " rows"]) -> None:
        """Append one token for each prediction."""

    @abstractmethod
    def finish(self) -> bytes:
        """End the chunk."""

    @property
    def nbytes(self) -> int:
        """Bytes that the begun chunk will take at least."""
        return 0


class TokenCoder(TokenWriter):
    """Tokens <-> bytes: a chunk is read by `open` and `get`..."""

    @abstractmethod
    def open(self, data: bytes, count: int) -> None:
        """Begin to read a chunk of `count` tokens."""

    @abstractmethod
    def get(self, logits: Float[np.ndarray, "rows vocab"]) -> Int[np.ndarray, " rows"]:
        """The next token of each prediction."""

    @abstractmethod
    def trace(self, logits: Float[np.ndarray, "rows vocab"]) -> bytes:
        """All that coding one step takes from the model and from floating-point numbers."""


class DirectCoder(TokenCoder):
    """Range coding with the model's own probabilities."""

    def __init__(self) -> None:
        self._encoder, self._decoder = RangeEncoder(), RangeDecoder(b"")

    def put(self, logits: Float[np.ndarray, "rows vocab"], tokens: Int[np.ndarray, " rows"]) -> None:
        self._encoder.put(tokens, frequencies(logits))

    @property
    def nbytes(self) -> int:
        return self._encoder.nbytes

    def finish(self) -> bytes:
        done, self._encoder = self._encoder, RangeEncoder()
        return done.finish()

    def open(self, data: bytes, count: int) -> None:  # noqa: ARG002
        self._decoder = RangeDecoder(data)

    def get(self, logits: Float[np.ndarray, "rows vocab"]) -> Int[np.ndarray, " rows"]:
        return self._decoder.get(frequencies(logits))

    def trace(self, logits: Float[np.ndarray, "rows vocab"]) -> bytes:
        return frequencies(logits).tobytes()


class RanksCoder(TokenCoder):
    """Each token as its rank, by one of the `RANK_CODERS`."""

    def __init__(self, backend: str, vocab: int) -> None:
        self._coder = RANK_CODERS[backend](vocab)
        self._ranks: list[np.ndarray] = []
        self._uncertainty: list[np.ndarray] = []

    def put(self, logits: Float[np.ndarray, "rows vocab"], tokens: Int[np.ndarray, " rows"]) -> None:
        self._ranks.append(rank_of(logits, tokens))
        self._uncertainty.append(self._of(logits))

    def finish(self) -> bytes:
        data = self._coder.encode(np.concatenate(self._ranks), np.concatenate(self._uncertainty))
        self._ranks, self._uncertainty = [], []
        return data

    def open(self, data: bytes, count: int) -> None:
        self._coder.open(data, count)

    def get(self, logits: Float[np.ndarray, "rows vocab"]) -> Int[np.ndarray, " rows"]:
        return token_of(logits, self._coder.next(self._of(logits)))

    def trace(self, logits: Float[np.ndarray, "rows vocab"]) -> bytes:
        table = quantize(zipf(np.array([1.3, 2.0]), logits.shape[1])).tobytes() if isinstance(self._coder, ZipfRanks) else b""
        return logits.tobytes() + self._of(logits).tobytes() + table

    def _of(self, logits: Float[np.ndarray, "rows vocab"]) -> Float[np.ndarray, " rows"]:
        return uncertainty(logits) if self._coder.uses_uncertainty else np.zeros(len(logits))


def token_coder(method: str, backend: str, vocab: int) -> TokenCoder:
    """A new coder for one file."""
    return DirectCoder() if method == "direct" else RanksCoder(backend, vocab)


def stream_lengths(tokens: int, streams: int) -> list[int]:
    """Tokens of each stream, in the order of the text, longest first.

    Example:
        >>> from basin_lens.codec.lockstep import stream_lengths
        >>> stream_lengths(7, 3)
        [3, 2, 2]
    """
    return [tokens // streams + (index < tokens % streams) for index in range(streams)]


def encode_tokens(
    stepper: Stepper,
    tokens: Int[np.ndarray, " n"],
    start: int,
    window: int,
    coder: TokenWriter,
    tick: Callable[[int], object] = lambda _: None,
    *,
    windows: int = 1,
    below: int | None = None,
) -> Iterator[tuple[bytes, int]]:
    """The chunks of a text, and the tokens in each.

    Args:
        stepper: of as many sequences as there are streams.
        tokens: the text's, `[n]`.
        start: token that opens every stream and every window.
        window: tokens after which the streams start anew.
        coder: a new one.
        tick: told the number of tokens after each step.
        windows: in a chunk.
        below: bytes; the walk ends, without a further chunk, as soon as all chunks together will take as many. None: it goes to the
            end.
    """
    size = 0
    lengths = stream_lengths(len(tokens), stepper.batch)
    rows = np.full((stepper.batch, lengths[0]), start, np.int64)
    for row, piece in zip(rows, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(piece)] = piece
    opening = np.full(stepper.batch, start, np.int64)
    for first in range(0, lengths[0], window * windows):
        last = min(first + window * windows, lengths[0])
        for place in range(first, last):
            live = _live(lengths, place)
            logits = _step(stepper, rows[:, place - 1] if place % window else opening, fresh=place % window == 0)
            coder.put(logits[:live], rows[:live, place])
            tick(live)
            if below is not None and size + coder.nbytes >= below:
                return
        chunk = coder.finish()
        size += len(chunk)
        if below is not None and size >= below:
            return
        yield chunk, chunk_tokens(lengths, first, last)


def decode_tokens(
    stepper: Stepper,
    chunks: Sequence[bytes],
    tokens: int,
    start: int,
    window: int,
    coder: TokenCoder,
    tick: Callable[[int], object] = lambda _: None,
    *,
    windows: int = 1,
) -> Int[np.ndarray, " n"]:
    """The tokens of a text from its chunks; see `encode_tokens`."""
    lengths = stream_lengths(tokens, stepper.batch)
    opening = np.full(stepper.batch, start, np.int64)
    parts: list[np.ndarray] = []  # as they come: nothing is set aside for what a header merely declares
    for index, first in enumerate(range(0, lengths[0], window * windows)):
        last = min(first + window * windows, lengths[0])
        coder.open(chunks[index], chunk_tokens(lengths, first, last))
        for place in range(first, last):
            live = _live(lengths, place)
            logits = _step(stepper, parts[-1] if place % window else opening, fresh=place % window == 0)
            chosen = opening.copy()  # a stream that has ended goes on with start tokens, as in the encoder
            chosen[:live] = coder.get(logits[:live])
            parts.append(chosen)
            tick(live)
    return np.concatenate([row[:length] for row, length in zip(np.stack(parts, axis=1), lengths, strict=True)])


def chunk_tokens(lengths: Sequence[int], first: int, last: int) -> int:
    """Tokens of all streams at the places `first` to `last`."""
    return sum(min(length, last) - min(length, first) for length in lengths)


def probe(stepper: Stepper, coder: TokenCoder) -> bytes:
    """Hash of what the model computes here, at this batch, on a fixed prompt, at places spread up to the window's last.

    Eight steps from an empty cache, then one at each power of two and one at the last place; what lies between is filled with
    copies of what the cache holds, since only the shapes decide how numbers are added up.

    Returns:
        8 bytes. Equal hashes are strong evidence, not proof, that a decoder here computes the encoder's numbers; the text's SHA-256
        decides.
    """
    digest = hashlib.blake2b(digest_size=8)
    powers = [(1 << power) - 1 for power in range(4, stepper.window.bit_length())]
    places = sorted({*range(min(_FIRST_STEPS, stepper.window)), *powers, stepper.window - 1})
    stepper.reset()
    for index, place in enumerate(places):
        if place > stepper.position:
            stepper.pretend(place)
        prompt = (7919 * index + 104_729 * np.arange(stepper.batch)) % stepper.vocab
        digest.update(coder.trace(_step(stepper, prompt)))
    stepper.reset()
    return digest.digest()


def _step(stepper: Stepper, tokens: Int[np.ndarray, " batch"], *, fresh: bool = False) -> Float[np.ndarray, "batch vocab"]:
    """Logits after one more token; `fresh`: the first of a window."""
    if fresh:
        stepper.reset()
    logits: np.ndarray = stepper.step(torch.from_numpy(np.ascontiguousarray(tokens))).numpy()
    if np.isnan(logits).any():
        raise CodecError("expected logits, got NaN. Use float32, or another model.")
    return logits


def _live(lengths: Sequence[int], place: int) -> int:
    """Streams that have a token at `place`; the longest come first."""
    return sum(length > place for length in lengths)
