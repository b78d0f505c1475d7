"""What is kept on disk, sealed: each record bears a digest of all that belongs to it, so that damage is refused and never read.

A file of its own (a table, a checkpoint, a record) holds its seal among its metadata: the SHA-256 of its bytes, taken while the
seal's own digits are zeros. A folder has a record, a sealed JSON file that lists size and SHA-256 of the files beside it.

A seal tells that nothing was changed, cut or exchanged since it was set. It is no signature: who can write the file can seal it
anew. So the fields of a record are still checked for what they should be (`fields`), and what else goes wrong in reading becomes a
refusal (`Kind.reading`).

Cost: one reading of the file, at about 2 GB/s where the processor has instructions for SHA-256, 0.4 GB/s where it does not.
"""

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NewType

from safetensors import SafetensorError, safe_open

from basin_lens.errors import BasinLensError, StoreError
from basin_lens.values import Facts

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object  # torch is not imported: a table does without

# What a field of a record must be: of a type, of one of several (None for null), or a list of one type.
Expected = type | tuple[type | None, ...] | list[type]

# A file or folder that `basin_lens.files` makes: it takes its place, whole, when whoever was handed it has filled it.
Unfinished = NewType("Unfinished", Path)

_DIGITS = 64
_SEAL = re.compile(rb"basin_lens seal sha256:([0-9a-f]{64})")
OPEN_SEAL = "basin_lens seal sha256:" + "0" * _DIGITS
# A text in the file may look like a seal; of so many, the last ones, one must be the seal.
_MOST_SEALS = 8
_BLOCK = 1 << 20
# A file changed again within its clock's tick would look unchanged: only files older than this are remembered.
_SETTLED = 2.0


@dataclass(frozen=True)
class Kind:
    """A kind of thing that is kept.

    `what`: its name in a sentence. `format`: what its record says it is, with the version. `cure`: what to do about a damaged one.
    `error`: what is raised.
    """

    what: str
    format: str
    cure: str
    error: type[BasinLensError] = StoreError

    def refusal(self, path: str | os.PathLike[str], got: object) -> BasinLensError:
        """The error to raise about the file or folder at `path`."""
        return self.error(f"expected {self.what} at {str(path)!r}, got {got}. {self.cure}")

    @contextmanager
    def reading(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """What fails inside is a refusal in this kind's own words; its own errors pass."""
        try:
            yield
        except self.error:
            raise
        except OSError as error:
            raise self.refusal(path, f"what cannot be read ({error.strerror or error})") from error
        except (
            SafetensorError,
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise self.refusal(path, f"a damaged one: {type(error).__name__}: {_first_line(error)}") from error

    def record(
        self,
        facts: Mapping[str, object],
        files: Mapping[str, Mapping[str, object]],
        *,
        indent: int | None = None,
        allow_nan: bool = True,
    ) -> bytes:
        """A folder's record as JSON: the facts, and the digests of its files by name (see `digest`)."""
        whole = {"format": self.format, **facts, "files": dict(files), "seal": OPEN_SEAL}
        return seal(json.dumps(whole, indent=indent, allow_nan=allow_nan).encode())

    def read(self, path: Path, expected: Mapping[str, Expected]) -> Facts:
        """The facts and `files` of a record.

        Args:
            path: the JSON file.
            expected: what each field must be, see `fields`.

        Raises:
            the kind's error: not there, damaged, or of another version.
        """
        with self.reading(path):
            content = path.read_bytes()
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.refusal(path, f"no JSON ({_first_line(error)})") from error
        if not isinstance(found, dict) or found.get("format") != self.format:
            other = found.get("format") if isinstance(found, dict) else None
            known = _other_version(other, self.format)
            raise self.refusal(
                path,
                known
                or f"one of an earlier version, which kept no digests, or another file (format {_short(other)}, not "
                f"{self.format!r})",
            )
        if not is_sealed(io.BytesIO(content)):
            raise self.refusal(path, "one that was changed after it was written: its digest is of another content")
        del found["format"], found["seal"]
        with self.reading(path):
            fields(found, {**expected, "files": dict})
            for name, facts in found["files"].items():
                fields(facts, {"bytes": int, "sha256": str})
                if Path(name).name != name or name in ("", ".", ".."):
                    raise ValueError(f"the file name {name!r}")
        return found

    def check(self, folder: Path, name: str, facts: Mapping[str, object], *, content: bool = True) -> Path:
        """The path of a file that a record lists, if the file is the one that was written; `content=False`: if it has that size.

        The content is read once, and again only if the file was changed since.

        Raises:
            the kind's error: it is not there, or another one.
        """
        path = folder / name
        with self.reading(folder):
            try:
                found = path.stat()
            except FileNotFoundError:
                raise self.refusal(folder, f"one without its file {name}") from None
            if found.st_size != facts["bytes"]:
                raise self.refusal(folder, f"one whose {name} has {found.st_size} bytes of {facts['bytes']}")
            if content and _digest_of(path, found) != facts["sha256"]:
                raise self.refusal(folder, f"one whose {name} was changed after it was written: its digest is another")
        return path

    def check_sealed(self, file: io.BufferedIOBase, path: str | os.PathLike[str]) -> None:
        """Refuse a file that is not as it was when it was sealed.

        Raises:
            the kind's error: without a seal, or changed since.
        """
        with self.reading(path):
            whole = is_sealed(file)
            if whole is None:
                raise self.refusal(path, "a file without its digest: cut, not from this program, or written by an earlier version")
            if not whole:
                raise self.refusal(path, "one that was changed after it was written: its digest is of another content")

    def write_tensors(self, path: Unfinished, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """A sealed safetensors file of its own; `facts` are its metadata."""
        from safetensors.torch import save_file  # brings torch

        save_file(dict(tensors), path, {**facts, "format": self.format, "seal": OPEN_SEAL})
        seal_file(path)

    @contextmanager
    def tensors(self, path: Path) -> Iterator[tuple[safe_open, dict[str, str]]]:
        """A sealed safetensors file, open, and its metadata; what fails inside is a refusal.

        Raises:
            the kind's error: without a seal, or changed since.
        """
        with self.reading(path):
            with path.open("rb") as file:
                self.check_sealed(file, path)
            with safe_open(path, framework="pt") as held:
                facts = held.metadata() or {}
                if facts.get("format") != self.format:
                    other = facts.get("format")
                    known = _other_version(other, self.format)
                    raise self.refusal(path, known or f"a file of format {_short(other)}, not {self.format!r}")
                yield held, facts


def digest(content: bytes | Path) -> Facts:
    """Size and SHA-256 of a file or of what will be one, as a record lists them."""
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with content.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def fields(found: object, expected: Mapping[str, Expected]) -> None:
    """Check a record's fields: each a type, a tuple of types (None for null), or a list of one type (a list of such).

    True is no number, and a whole number is one.

    Raises:
        ValueError: one that is missing, or is something else.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"expected fields, got {_short(found)}")
    for name, kind in expected.items():
        if name not in found:
            raise ValueError(f"no field {name!r}")
        value = found[name]
        good = isinstance(value, list) and all(_is(v, kind[0]) for v in value) if isinstance(kind, list) else _is(value, kind)
        if not good:
            raise ValueError(f"the field {name!r} is {_short(value)}")


def seal(content: bytes) -> bytes:
    """The content with its open seal (`OPEN_SEAL`, the last one in it) closed."""
    held = io.BytesIO(content)
    _close(held)
    return held.getvalue()


def seal_file(path: Unfinished) -> None:
    """Close the open seal in a file."""
    with path.open("r+b") as file:
        _close(file)


def is_sealed(file: io.BufferedIOBase) -> bool | None:
    """Whether a file is as it was when it was sealed; None without a seal."""
    places = _seals(file)
    if not places:
        return None
    return any(found != "0" * _DIGITS and _digest_around(file, at) == found for at, found in reversed(places[-_MOST_SEALS:]))


def _close(file: io.BufferedIOBase) -> None:
    at = [at for at, found in _seals(file) if found == "0" * _DIGITS][-1]
    found = _digest_around(file, at)
    file.seek(at)
    file.write(found.encode())


def _seals(file: io.BufferedIOBase) -> list[tuple[int, str]]:
    """Where the digits of each seal begin, and what they are."""
    file.seek(0)
    places: dict[int, str] = {}
    kept, at = b"", 0
    while block := file.read(_BLOCK):
        held = kept + block
        places |= {at + match.start(1): match[1].decode() for match in _SEAL.finditer(held)}
        kept = held[-(len(OPEN_SEAL) - 1) :]  # a seal may lie across two blocks
        at += len(held) - len(kept)
    return sorted(places.items())


def _digest_around(file: io.BufferedIOBase, hole: int) -> str:
    """SHA-256 of a file in which the digits at `hole` are zeros."""
    made, left = hashlib.sha256(), hole
    file.seek(0)
    while left and (block := file.read(min(left, _BLOCK))):
        made.update(block)
        left -= len(block)
    made.update(b"0" * _DIGITS)
    file.seek(hole + _DIGITS)
    while block := file.read(_BLOCK):
        made.update(block)
    return made.hexdigest()


def _digest_of(path: Path, found: os.stat_result) -> str:
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED:
        return str(digest(path)["sha256"])
    return _remembered(str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=1 << 16)
def _remembered(path: str, *_: int) -> str:
    return str(digest(Path(path))["sha256"])


def _is(value: object, kind: type | tuple[type | None, ...] | None) -> bool:
    if isinstance(kind, tuple):
        return any(_is(value, one) for one in kind)
    if kind is None:
        return value is None
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _other_version(found: object, own: str) -> str | None:
    """What to say of another version of the same format; None: it is another format."""
    name, _, version = own.rpartition(" ")
    other_name, _, other = str(found).rpartition(" ")
    if name != other_name or not other.isdecimal():
        return None
    newer = int(other) > int(version)
    writer = "a newer" if newer else "an earlier"
    told = f"one of format version {other}, which {writer} basin_lens wrote (this one reads {version})"
    return f"{told}. Update basin_lens to read it" if newer else told


def _short(value: object) -> str:
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 40 else text


def _first_line(error: BaseException) -> str:
    return next(iter((str(error).strip() or type(error).__name__).splitlines()))[:200].rstrip(".")
