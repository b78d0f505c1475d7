"""Locks that the system lets go when their process ends, however it ends."""

import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from basin_lens.values import Facts

if sys.platform != "win32":
    import fcntl

NAME = ".basin-lens.lock"  # in a folder that somebody writes to
MARK = ".basin-lens-"  # in the name of a folder in which something is prepared
# A lock that is a link to elsewhere would have what it leads to overwritten.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def lock(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the lock file while it is open, at most until its process ends; None if somebody else holds it.

    `shared`: together with others who hold it so.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        if not _hold(handle, path, shared=shared):
            os.close(handle)
            return None
        found = status_of(path)
        if found is not None and os.path.samestat(os.fstat(handle), found):
            return handle
        os.close(handle)  # it was let go, and so deleted, between the opening and the lock


def _hold(handle: int, path: Path, *, shared: bool = False) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: what the file says must do
            return _is_gone(read(path))
        return True
    return _is_gone(read(path))


def _is_gone(told: Facts) -> bool:
    """Whether the process that wrote a lock file has ended, as far as can be known."""
    if not told:
        return True
    if told.get("host") != socket.gethostname() or sys.platform == "win32":
        return False
    try:
        os.kill(int(told["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def tell(handle: int, target: str) -> None:
    """Say in a lock file whose it is."""
    told = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "target": target,
    }
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(told).encode())


def read(path: Path) -> Facts:
    """What a lock file says; nothing if it cannot be read."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def who(path: Path) -> str:
    """The holder, in words."""
    told = read(path)
    return (
        f"process {told['pid']} on {told['host']} (since {told['since']})"
        if {"pid", "host", "since"} <= set(told)
        else "another process"
    )


def is_own(name: str) -> bool:
    """Whether a name in an output folder is that of its lock, or of what is being prepared there: no result, and nobody's work."""
    return name == NAME or (name.startswith(".") and MARK in name)


def holder(folder: Path) -> str | None:
    """Who writes to a folder now, in words; None if nobody does. Nothing is written: it may be another user's folder."""
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDONLY | _NO_LINK)
    except FileNotFoundError:
        return None
    except OSError:  # not to be read
        return who(path)
    try:
        return None if _hold(handle, path) else who(path)
    finally:
        os.close(handle)


def unlock(handle: int, path: Path, *, shared: bool = False) -> None:
    """Let go, and delete the lock file if it is still this one and nobody shares it."""
    found = status_of(path)
    ours = found is not None and os.path.samestat(os.fstat(handle), found)  # with a replaced folder it is gone
    if ours and (not shared or _hold(handle, path)):
        path.unlink(missing_ok=True)
    os.close(handle)


def status_of(place: str | os.PathLike[str] | int) -> os.stat_result | None:
    """Of a file, through links, or of a descriptor; None if there is none."""
    try:
        return os.stat(place)
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None
