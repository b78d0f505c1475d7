"""Files that the model wrote, also where storing would be smaller."""

import lzma
import struct
import zlib

from basin_lens import codec
from basin_lens.codec import rank_coders
from tests.conftest import TEXTS

METHODS = [("direct", "range"), *(("ranks", name) for name in rank_coders.RANK_CODERS)]


TEXT = " ".join(TEXTS)


def coded(coder: codec.TextCodec, data: str) -> bytes:
    """The model's file, also where storing would be smaller: on tiny random models it nearly always is."""
    coder.streams_for = lambda tokens: max(1, min(coder.streams, tokens // 4))
    return coder.encode_text(*coder.prepared(data))


def resealed(blob: bytes, at: int, new: bytes) -> bytes:
    """The file with other header bytes and a right header checksum."""
    (size,) = struct.unpack_from("<I", blob, 8)
    head = blob[:at] + new + blob[at + len(new) : size - 4]
    return head + zlib.crc32(head).to_bytes(4, "little") + blob[size:]


# -- commands --------------------------------------------------------------------------------------------------------------------------


def weaken_xz(monkeypatch) -> None:
    """Its strongest setting clears hundreds of megabytes at every call; here no size of it is looked at."""
    plain = lzma.compress
    monkeypatch.setattr(lzma, "compress", lambda data, **_: plain(data, preset=0))
