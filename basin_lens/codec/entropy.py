"""Symbols <-> bytes: a range coder over integer frequencies, canonical Huffman codes, and zlib over whole numbers.

None of them notices changed bytes: the container does, by its checksums.
"""

import heapq
import zlib
from collections import Counter

import constriction
import numpy as np
from jaxtyping import Int

from basin_lens.codec.probabilities import PRECISION
from basin_lens.errors import CorruptFileError

_WORD = np.dtype("<u4")
_LENGTH_BITS = 6  # of a Huffman code's length: 2^40 symbols are needed to make one of 60 bits


class RangeEncoder:
    """First symbol in, first symbol out; within a few bytes of -log2(frequency / 2^24) summed over the symbols.

    Words of 32 bits, a state of 64: `constriction`'s `stream.queue.RangeEncoder`, which takes `perfect=False` at its word: counts
    whose sum is 2^24 - n are used as they are, each plus 1.

    Source: Martin 1979; Bamler 2022 (constriction).

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.entropy import RangeDecoder, RangeEncoder
        >>> table = np.array([[2**24 - 2, 1, 1]], np.int32)
        >>> encoder = RangeEncoder()
        >>> encoder.put(np.array([2]), table)
        >>> int(RangeDecoder(encoder.finish()).get(table)[0])
        2
    """

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def put(self, symbols: Int[np.ndarray, " rows"], table: Int[np.ndarray, "tables n"]) -> None:
        """Append one symbol for each row of `table` (frequencies, see `quantize`), or every symbol by its only row."""
        given = symbols.astype(np.int32)
        if len(table) == 1:
            self._coder.encode(given, constriction.stream.model.Categorical(table[0] - 1.0, perfect=False))
        else:
            self._coder.encode(given, _FAMILY, table - 1.0)

    def put_bits(self, value: int, bits: int) -> None:
        """Append `bits` bits (at most 23) at their own price."""
        if bits:
            self._coder.encode(np.array([value], np.int32), constriction.stream.model.Uniform(1 << bits))

    @property
    def nbytes(self) -> int:
        """Bytes that what was put takes at least; `finish` may add up to two words."""
        return _WORD.itemsize * max(0, int(self._coder.num_words()) - 2)

    def finish(self) -> bytes:
        """Everything that was put, in whole words of 4 bytes."""
        return self._coder.get_compressed().astype(_WORD).tobytes()


class RangeDecoder:
    """What `RangeEncoder` made, back in the same order and with the same tables.

    Raises:
        CorruptFileError: bytes that no encoder wrote, as far as that shows.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) % _WORD.itemsize:
            raise CorruptFileError(f"expected whole words of 4 bytes, got {len(data)} bytes. Get the file again.")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, _WORD).astype(np.uint32))

    def get(self, table: Int[np.ndarray, "rows n"]) -> Int[np.ndarray, " rows"]:
        """The next symbols, one for each row of `table`."""
        return self._decoded(_FAMILY, table - 1.0).astype(np.int64)

    def get_many(self, count: int, table: Int[np.ndarray, " n"]) -> Int[np.ndarray, " count"]:
        """The next `count` symbols, all by one table."""
        return self._decoded(constriction.stream.model.Categorical(table - 1.0, perfect=False), count).astype(np.int64)

    def get_bits(self, bits: int) -> int:
        """The next `bits` bits."""
        return int(self._decoded(constriction.stream.model.Uniform(1 << bits), 1)[0]) if bits else 0

    def _decoded(self, model: object, given: object) -> np.ndarray:
        try:
            return self._coder.decode(model, given)
        except AssertionError as error:
            raise CorruptFileError("expected range-coded symbols, got bytes that no encoder wrote. Get the file again.") from error


_FAMILY = constriction.stream.model.Categorical(perfect=False)
assert 1 << PRECISION == 2**24, "constriction's Categorical has 24 bits"


def huffman_encode(symbols: Int[np.ndarray, " n"]) -> bytes:
    """A canonical Huffman code for these symbols, and the symbols in it.

    Layout, in bits from the highest: 6 bits for the number of code lengths, 6 bits for each length (0: does not occur), then the
    codes, zeros to a whole byte. Codes are counted up by length, then by symbol.

    Args:
        symbols: whole numbers in [0, 62].

    Source: Huffman 1952; Schwartz and Kallick 1964 (canonical).

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.entropy import huffman_decode, huffman_encode
        >>> huffman_decode(huffman_encode(np.array([0, 0, 3, 0])), 4).tolist()
        [0, 0, 3, 0]
    """
    lengths = _code_lengths(Counter(symbols.tolist()))
    codes = {symbol: f"{code:0{length}b}" for symbol, (code, length) in _canonical(lengths).items()}
    head = [len(lengths), *lengths]
    return pack_bits("".join([*(f"{number:0{_LENGTH_BITS}b}" for number in head), *(codes[s] for s in symbols.tolist())]))


def huffman_decode(data: bytes, count: int) -> Int[np.ndarray, " count"]:
    """The first `count` symbols; what follows their codes is not looked at.

    Raises:
        CorruptFileError: no such code, or too few bits.
    """
    bits, at = unpack_bits(data), _LENGTH_BITS
    lengths = [_number(bits, at + _LENGTH_BITS * i, _LENGTH_BITS) for i in range(_number(bits, 0, _LENGTH_BITS))]
    at += _LENGTH_BITS * len(lengths)
    symbol_of = {f"{code:0{length}b}": symbol for symbol, (code, length) in _canonical(lengths).items()}
    symbols = np.empty(count, np.int64)
    longest = max(lengths, default=0)
    for index in range(count):
        end = next((end for end in range(at + 1, min(at + longest, len(bits)) + 1) if bits[at:end] in symbol_of), None)
        if end is None:
            raise CorruptFileError(f"expected {count} Huffman codes, got bits that are none after {index}. Get the file again.")
        symbols[index], at = symbol_of[bits[at:end]], end
    return symbols


def pack_bits(bits: str) -> bytes:
    """A string of 0 and 1 as bytes, the first bit highest, zeros to a whole byte."""
    size = (len(bits) + 7) // 8
    return int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


def unpack_bits(data: bytes) -> str:
    """The inverse of `pack_bits`, with the last byte's zeros."""
    return f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""


def zlib_encode(numbers: Int[np.ndarray, " n"]) -> bytes:
    """Whole numbers as LEB128 (7 bits a byte, lowest first), then zlib at level 9.

    Example:
        >>> import numpy as np
        >>> from basin_lens.codec.entropy import zlib_decode, zlib_encode
        >>> zlib_decode(zlib_encode(np.array([0, 300, 7])), 3).tolist()
        [0, 300, 7]
    """
    plain = bytearray()
    for number in numbers.tolist():
        while number > 127:
            plain.append(number & 127 | 128)
            number >>= 7
        plain.append(number)
    return zlib.compress(bytes(plain), 9)


def zlib_decode(data: bytes, count: int) -> Int[np.ndarray, " count"]:
    """The inverse of `zlib_encode`; takes no more memory than `count` numbers can need.

    Raises:
        CorruptFileError: not zlib, or another number of numbers.
    """
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data, 4 * count + 1)
    except zlib.error as error:
        raise CorruptFileError(f"expected zlib data, got {error}. Get the file again.") from error
    numbers, number, shift = [], 0, 0
    for byte in plain:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    if len(numbers) != count or shift or not reader.eof:
        raise CorruptFileError(f"expected {count} numbers, got {len(numbers)}. Get the file again.")
    return np.array(numbers, np.int64)


def _code_lengths(counts: Counter[int]) -> list[int]:
    """Bits of each symbol's code, 0 for those that do not occur."""
    if not counts:
        return []
    lengths = [0] * (max(counts) + 1)
    if len(counts) == 1:
        lengths[next(iter(counts))] = 1
        return lengths
    # Ties by the smallest symbol below, so that equal counts give equal codes everywhere.
    heap = [(count, symbol, [symbol]) for symbol, count in counts.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (one, first, left), (other, second, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (*left, *right):
            lengths[symbol] += 1
        heapq.heappush(heap, (one + other, min(first, second), left + right))
    return lengths


def _canonical(lengths: list[int]) -> dict[int, tuple[int, int]]:
    """Symbol -> (code, bits)."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        codes[symbol], code, before = (code, length), code + 1, length
    return codes


def _number(bits: str, at: int, size: int) -> int:
    piece = bits[at : at + size]
    if len(piece) < size:
        raise CorruptFileError("expected the lengths of Huffman codes, got too few bits. Get the file again.")
    return int(piece, 2)
