"""Ranks <-> bytes: the back ends of the method "ranks", chunk after chunk.

Small ranks are symbols of their own, large ones share a symbol for each power of two and add their lower bits, as in deflate:

    rank r < 32: symbol r          r >= 32: symbol 32 + floor(log2(r - 31)), and that many bits of r - 31
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from basin_lens.codec.entropy import (
    RangeDecoder,
    RangeEncoder,
    huffman_decode,
    huffman_encode,
    pack_bits,
    unpack_bits,
    zlib_decode,
    zlib_encode,
)
from basin_lens.codec.probabilities import quantize
from basin_lens.errors import CorruptFileError

_OWN = 32  # ranks with a symbol of their own
_PARAMETERS = np.dtype("<f4")


def split(rank: int) -> tuple[int, int, int]:
    """Symbol, lower bits and their number.

    Example:
        >>> from basin_lens.codec.rank_coders import split
        >>> split(7), split(34)
        ((7, 0, 0), (33, 1, 1))
    """
    if rank < _OWN:
        return rank, 0, 0
    above = rank - _OWN + 1
    bits = above.bit_length() - 1
    return _OWN + bits, above - (1 << bits), bits


def joined(symbol: int, low: int) -> int:
    """The rank of a symbol and its lower bits."""
    return symbol if symbol < _OWN else _OWN - 1 + (1 << (symbol - _OWN)) + low


class RankCoder(ABC):
    """One back end. `encode` and `open` take the chunks of a file in order: what was learned on one serves for the next.

    Args:
        vocab: number of ranks there are.
    """

    uses_uncertainty: ClassVar[bool] = False

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    @abstractmethod
    def encode(self, ranks: Int[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> bytes:
        """A chunk's ranks as bytes; `uncertainty` is the entropy of each prediction in bits, for the back end that uses it."""

    @abstractmethod
    def open(self, data: bytes, count: int) -> None:
        """Begin to read a chunk of `count` ranks."""

    @abstractmethod
    def next(self, uncertainty: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The chunk's next ranks, one for each prediction."""


class _Whole(RankCoder):
    """A back end that needs no predictions to read a chunk."""

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self._ranks, self._at = np.empty(0, np.int64), 0

    @abstractmethod
    def decode(self, data: bytes, count: int) -> Int[np.ndarray, " count"]:
        """All of a chunk."""

    def open(self, data: bytes, count: int) -> None:
        self._ranks, self._at = self.decode(data, count), 0

    def next(self, uncertainty: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        self._at += len(uncertainty)
        return self._ranks[self._at - len(uncertainty) : self._at]


class ZlibRanks(_Whole):
    """LEB128 and zlib, the plainest way."""

    def encode(self, ranks: Int[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> bytes:  # noqa: ARG002
        return zlib_encode(ranks)

    def decode(self, data: bytes, count: int) -> Int[np.ndarray, " count"]:
        return zlib_decode(data, count)


class HuffmanRanks(_Whole):
    """A canonical Huffman code per chunk, its lengths counted, then the lower bits of all large ranks."""

    def encode(self, ranks: Int[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> bytes:  # noqa: ARG002
        parts = [split(rank) for rank in ranks.tolist()]
        codes = huffman_encode(np.array([symbol for symbol, _, _ in parts], np.int64))
        return codes + pack_bits("".join(f"{low:0{bits}b}" for _, low, bits in parts if bits))

    def decode(self, data: bytes, count: int) -> Int[np.ndarray, " count"]:
        symbols = huffman_decode(data, count)
        sizes = np.maximum(symbols - _OWN, 0)
        # The lower bits begin at a whole byte, counted from the end: the codes' own length is not written down.
        size = (int(sizes.sum()) + 7) // 8
        bits, at, ranks = unpack_bits(data[len(data) - size :] if size else b""), 0, []
        for symbol, width in zip(symbols.tolist(), sizes.tolist(), strict=True):
            piece = bits[at : at + width]
            ranks.append(joined(symbol, int(piece, 2) if piece else 0))
            at += width
        return np.array(ranks, np.int64)


class ZipfRanks(_Whole):
    """One power law per chunk, p(r) ~ (r + 1 + q)^-s, fitted by maximum likelihood; s and q are stored (8 bytes, float32).

    Source: Mandelbrot 1953; Zipf 1935 (q = 0).
    """

    def encode(self, ranks: Int[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> bytes:  # noqa: ARG002
        parameters = fit_zipf(ranks, self.vocab)
        encoder = RangeEncoder()
        encoder.put(ranks, quantize(zipf(parameters, self.vocab))[None])
        return parameters.tobytes() + encoder.finish()

    def decode(self, data: bytes, count: int) -> Int[np.ndarray, " count"]:
        size = 2 * _PARAMETERS.itemsize
        parameters = np.frombuffer(data[:size] if len(data) >= size else b"", _PARAMETERS)
        if not len(parameters) or not (np.isfinite(parameters).all() and 0 < parameters[0] <= 64 and 0 <= parameters[1] <= 1e6):
            raise CorruptFileError(f"expected the two parameters of a power law, got {parameters.tolist()}. Get the file again.")
        return RangeDecoder(data[size:]).get_many(count, quantize(zipf(parameters, self.vocab)))


class AdaptiveRanks(RankCoder):
    """Arithmetic coding by how often each symbol has come so far, from a prior of 8 symbols spread as 1 / (rank + 1)."""

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        shares = np.zeros(split(vocab - 1)[0] + 1)
        for symbol in range(len(shares)):
            first = joined(symbol, 0)
            last = min(vocab, joined(symbol + 1, 0) if symbol >= _OWN else first + 1)
            shares[symbol] = np.sum(1.0 / np.arange(first + 1, last + 1))
        self._seen = 8.0 * shares / shares.sum()
        self._decoder = RangeDecoder(b"")

    def encode(self, ranks: Int[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> bytes:
        encoder = RangeEncoder()
        for rank, bits in zip(ranks.tolist(), uncertainty.tolist(), strict=True):
            symbol, low, width = split(rank)
            encoder.put(np.array([symbol]), quantize(self.weights(bits))[None])
            encoder.put_bits(low, width)
            self.learn(symbol, bits)
        return encoder.finish()

    def open(self, data: bytes, count: int) -> None:  # noqa: ARG002
        self._decoder = RangeDecoder(data)

    def next(self, uncertainty: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        ranks = np.empty(len(uncertainty), np.int64)
        for index, bits in enumerate(uncertainty.tolist()):
            symbol = int(self._decoder.get(quantize(self.weights(bits))[None])[0])
            ranks[index] = joined(symbol, self._decoder.get_bits(max(0, symbol - _OWN)))
            self.learn(symbol, bits)
        return ranks

    def weights(self, bits: float) -> Float[np.ndarray, " symbols"]:  # noqa: ARG002
        """What is expected of the next symbol, given the prediction's entropy."""
        return self._seen

    def learn(self, symbol: int, bits: float) -> None:  # noqa: ARG002
        """A symbol has come."""
        self._seen[symbol] += 1.0


class EntropyRanks(AdaptiveRanks):
    """As `AdaptiveRanks`, counted apart by the entropy of the model's prediction.

    Each count starts from the common one, worth 32 symbols.
    """

    uses_uncertainty: ClassVar[bool] = True
    _EDGES = np.array([0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])  # bits

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self._apart = np.zeros((len(self._EDGES) + 1, len(self._seen)))

    def weights(self, bits: float) -> Float[np.ndarray, " symbols"]:
        return self._apart[np.searchsorted(self._EDGES, bits)] + 32.0 * self._seen / self._seen.sum()

    def learn(self, symbol: int, bits: float) -> None:
        super().learn(symbol, bits)
        self._apart[np.searchsorted(self._EDGES, bits), symbol] += 1.0


RANK_CODERS: dict[str, type[RankCoder]] = {
    "zlib": ZlibRanks,
    "huffman": HuffmanRanks,
    "adaptive": AdaptiveRanks,
    "zipf": ZipfRanks,
    "entropy": EntropyRanks,
}


def zipf(parameters: Float[np.ndarray, "2"], vocab: int) -> Float[np.ndarray, " vocab"]:
    """(rank + 1 + q)^-s for every rank, 1 at rank 0."""
    s, q = (float(value) for value in parameters)
    return np.exp(-s * (np.log(np.arange(vocab) + 1.0 + q) - np.log(1.0 + q)))


def fit_zipf(ranks: Int[np.ndarray, " n"], vocab: int) -> Float[np.ndarray, "2"]:
    """The power law (s, q) under which the ranks are most likely, s in [0.01, 32], q in [0, 10000]; float32.

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.rank_coders import fit_zipf
        >>> fit_zipf(np.zeros(100, np.int64), vocab=50).tolist()[0] > 8
        True
    """
    values, counts = np.unique(ranks, return_counts=True)

    def cost(parameters: np.ndarray) -> float:
        s, q = np.exp(parameters[0]), np.expm1(parameters[1])
        logs = np.log(np.arange(vocab) + 1.0 + q)
        logs -= logs[0]
        return float(s * np.dot(counts, logs[values]) + len(ranks) * np.log(np.exp(-s * logs).sum()))

    limits = [(np.log(0.01), np.log(32.0)), (0.0, np.log1p(10_000.0))]
    found = optimize.minimize(
        cost, [0.3, 0.5], method="Nelder-Mead", bounds=limits, options={"maxfev": 200, "xatol": 1e-3, "fatol": 0.05}
    )
    return np.array([np.exp(found.x[0]), np.expm1(found.x[1])], _PARAMETERS)
