"""The one place that writes: files and folders whole or not at all, in nobody's way, and with nothing left behind by a death.

What is being written stands in a scratch folder beside its place, and takes the place by a rename. A scratch folder holds a lock
that the system lets go when its process ends, however it ends; by it, the next run knows what the dead left behind.
"""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from basin_lens import locks
from basin_lens.errors import BasinLensError, StoreError
from basin_lens.records import Unfinished

Place = str | os.PathLike[str]
# A file's bytes or text, or what writes it to the path that it is given.
Content = bytes | str | Callable[[Unfinished], object]

_LOCK, _MARK = locks.NAME, locks.MARK
_NEW, _OLD = ".basin-lens.new", ".basin-lens.old"
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_TRIES, _PAUSE = 10, 0.03  # seconds
_NOCTTY = getattr(os, "O_NOCTTY", 0)
_locked = threading.local()

# ---- files ----------------------------------------------------------------------------------------------------------------------


def write_file(
    path: Place, content: Content, *, replace: bool = True, inputs: Sequence[Place | int] = (), like: Place | int | None = None
) -> None:
    """Write a regular file, all of it or nothing; the file that it replaces hands on its mode and owner.

    Pipes, character devices and the process's own streams (`/dev/stdout`, `/dev/fd/N`) are written through.

    Args:
        path: where; its folder must be there.
        content: bytes, text (UTF-8), or a function that writes to the path it is given (a name with the same suffix).
        replace: whether a file that is there may be replaced.
        inputs: files (or descriptors) that were read: never written onto, by whatever name.
        like: a file (or descriptor) whose mode and owner the new file takes over, so that a secret stays one.

    Raises:
        StoreError: a folder, a link, an input, a file that is there and may not be replaced, or a place that cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from basin_lens.files import write_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder) / "note.txt", "whole or not at all")
        ...     (Path(folder) / "note.txt").read_text()
        'whole or not at all'
    """
    target = Path(path)
    check_file(target, replace=replace, inputs=inputs)
    try:
        if is_stream(target):
            _write_through(target, content)
            return
        with scratch(target) as folder:
            new = Unfinished(folder / target.name)
            _fill(new, content)
            _take_over(new, target, like)
            _sync(new)
            check_file(target, replace=replace, inputs=inputs)  # of what came there meanwhile
            os.replace(new, target)
            _sync(target.parent)
    except OSError as error:
        raise StoreError(
            f"expected a place that can be written, got {str(target)!r}: {error.strerror or error}. Choose another."
        ) from error


def append_line(path: Place, line: str) -> None:
    """Add a line to a text file, which is made if it is not there; a death may leave the last line cut.

    Raises:
        StoreError: what `write_file` refuses, or a place that cannot be written.
    """
    target = Path(path)
    check_file(target)
    try:
        with target.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise StoreError(
            f"expected a place that can be written, got {str(target)!r}: {error.strerror or error}. Choose another."
        ) from error


def check_file(path: Place, *, replace: bool = True, inputs: Sequence[Place | int] = ()) -> None:
    """Refuse what `write_file` would: to be called before any long work, too.

    Raises:
        StoreError: see there.
    """
    target = Path(path)
    check_name(target)
    found = locks.status_of(path if (stream := _descriptor(target)) is None else stream)
    if found is not None and stat.S_ISREG(found.st_mode):
        for one in inputs:
            read = locks.status_of(one)
            if read is not None and os.path.samestat(read, found):
                raise StoreError(f"expected an output other than the input, got {str(target)!r}, which is read. Choose another.")
    if is_stream(target):
        return
    if target.is_symlink():
        raise StoreError(
            f"expected a regular file, got {str(target)!r}, a link to {os.readlink(target)!r}. Name the file itself, or delete the "
            "link."
        )
    if found is not None and not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise StoreError(f"expected a place that can be written, got {str(target)!r}, which is {what}. Choose another.")
    if found is not None and not replace:
        raise StoreError(f"expected an output that is not there yet, got {str(target)!r}. Choose another, or delete it.")
    if not target.parent.is_dir():
        raise StoreError(
            f"expected a place that can be written, got {str(target)!r}, but no folder {str(target.parent)!r}. Make it first."
        )


def check_name(path: Place, error: type[BasinLensError] = StoreError) -> None:
    """Refuse a name that nothing can have, or that cannot be looked up: too long, say, or below a folder that is closed.

    Raises:
        StoreError (or `error`): see there.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):  # nothing there yet; what is not a folder is said with its own words
        return
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"expected a place that can be written, got {str(path)!r}: {reason}. Choose another.") from problem


def check_no_inputs(folder: Place, inputs: Sequence[Place]) -> None:
    """Refuse a folder whose results would take the place of what is read.

    Raises:
        StoreError: an input lies in it.
    """
    target = Path(folder).resolve()
    for one in inputs:
        if Path(one).resolve().is_relative_to(target):
            raise StoreError(
                f"expected results beside what is read, got {str(folder)!r} with the input {str(one)!r} in it. Choose --out."
            )


def is_stream(path: Place) -> bool:
    """Whether bytes go through this name to somewhere else: a pipe, a character device, or a stream of this process."""
    found = locks.status_of(path)
    return _descriptor(path) is not None or (found is not None and (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)))


def is_terminal(path: Place) -> bool:
    """Whether what is written to this name is shown to somebody."""
    found, stream = locks.status_of(path), _descriptor(path)
    if stream is not None:
        return os.isatty(stream)
    if found is None or not stat.S_ISCHR(found.st_mode):
        return False
    try:
        handle = os.open(path, os.O_WRONLY | _NOCTTY)
    except OSError:  # it will be refused when it is written
        return False
    try:
        return os.isatty(handle)
    finally:
        os.close(handle)


def _descriptor(path: Place) -> int | None:
    """The number that a name of this process's own streams stands for."""
    name = os.path.abspath(path)
    if name in _STREAMS:
        return _STREAMS[name]
    folder, number = os.path.split(name)
    return int(number) if folder in ("/dev/fd", "/proc/self/fd") and number.isdecimal() else None


def _fill(path: Unfinished, content: Content) -> None:
    if callable(content):
        content(path)
        return
    try:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except UnicodeEncodeError as error:
        raise StoreError(
            f"expected text that UTF-8 can hold for {path.name!r}, got a lone surrogate at character {error.start}. Decode it "
            "properly."
        ) from error


def _write_through(target: Path, content: Content) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Unfinished(Path(folder) / target.name)
        _fill(made, content)
        sys.stdout.flush()
        stream = _descriptor(target)
        handle = os.open(target, os.O_WRONLY | _NOCTTY) if stream is None else os.dup(stream)
        with made.open("rb") as source, open(handle, "wb") as sink:
            shutil.copyfileobj(source, sink)


def _take_over(new: Path, target: Path, like: Place | int | None) -> None:
    """Mode and owner of the file that is replaced, or of `like`; without either, as the umask has it."""
    given = None if like is None else locks.status_of(like)
    model = given if given is not None and stat.S_ISREG(given.st_mode) else locks.status_of(target)
    if model is None or sys.platform == "win32":
        return
    mode = stat.S_IMODE(model.st_mode) & 0o777
    try:
        os.chown(new, model.st_uid, model.st_gid)
    except OSError:
        try:
            os.chown(new, -1, model.st_gid)
        except OSError:  # another group: it may do what everybody may
            mode &= ~0o070 | (mode & 0o007) << 3
    os.chmod(new, mode)


def _sync(path: Path) -> None:
    """Have what was written on the disk before a name says that it is there; where that cannot be, the system sees to it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


# ---- folders --------------------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(target: Place, *, replace: bool = False, check: Callable[[Path], object] | None = None) -> Iterator[Unfinished]:
    """A folder to fill that takes its name only when the block is left without an error, all at once.

    A folder that is replaced is moved aside, and deleted when the new one stands in its place; a death between the two is healed by
    the next run (`clear_leavings`).

    Args:
        target: its name.
        replace: whether a folder that is there is replaced.
        check: called with the target before it is replaced; it raises what forbids that.

    Raises:
        StoreError: the folder is there and may not be replaced, or cannot be written.
    """
    place = Path(target).absolute()
    check_folder(place)
    clear_leavings(place.parent)
    if not replace and os.path.lexists(place):
        raise StoreError(f"expected a new folder, got {str(place)!r}, which exists. Choose another name or delete it.")
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
        raise StoreError(f"expected a folder that can be written, got {str(place)!r}, which is a file or a link. Choose another.")
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch(place))
            new = Unfinished(folder / _NEW)
            new.mkdir()
        except OSError as error:
            raise StoreError(
                f"expected a folder that can be written, got {str(place)!r}: {error.strerror}. Choose another."
            ) from error
        yield new
        if check is not None:
            check(place)
        try:
            _settle(new)
            _put(new, place, folder / _OLD, replace=replace)
        except OSError as error:
            if not replace and os.path.lexists(place):
                raise StoreError(f"expected a new folder, got {str(place)!r}, which exists by now. Choose another name.") from error
            raise StoreError(
                f"expected a folder that can be written, got {str(place)!r}: {error.strerror}. Choose another."
            ) from error


def check_folder(target: Place) -> None:
    """Refuse what `new_folder` could not put in its place when the work is done: to be called before it, too.

    Raises:
        StoreError: a name that nothing can have, a mount point, or a folder beside which nothing can be written.
    """
    place = Path(target).absolute()
    check_name(place)
    if os.path.ismount(place):
        raise StoreError(
            f"expected a folder that can be replaced as a whole, got {str(place)!r}, a mount point. Name a folder in it, such as "
            f"{str(place / 'results')!r}."
        )
    beside = next((part for part in place.parents if part.exists()), place)
    if beside.is_dir() and not os.access(beside, os.W_OK | os.X_OK):
        raise StoreError(
            f"expected a folder that can be replaced as a whole, got {str(place)!r}, beside which ({str(beside)!r}) nothing can be "
            "written. Choose another."
        )


def _settle(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync(path)


def _put(new: Path, target: Path, old: Path, *, replace: bool) -> None:
    """Into its place; what stood there goes to `old`, and back should the new one not fit (see `_remove`)."""
    if replace and target.exists():
        os.chmod(new, stat.S_IMODE(target.stat().st_mode))
        os.rename(target, old)
    os.rename(new, target)
    _sync(target.parent)


@contextmanager
def lock_folder(folder: Place, error: type[BasinLensError] = StoreError, *, shared: bool = False) -> Iterator[Path]:
    """Hold an output folder for this thread: made if missing, the leavings of the dead cleared; removed if nothing was put in it.

    Whoever holds the folder may lock it again.

    Args:
        folder: which.
        error: the kind of error to raise.
        shared: hold it together with others who hold it so.

    Raises:
        StoreError (or `error`): somebody else writes there (who is said), or the folder cannot be written.
    """
    check_name(folder, error)
    target = Path(folder).resolve()
    held: set[Path] = _locked.__dict__.setdefault("folders", set())
    if target in held:
        yield target
        return
    clear_leavings(target.parent)
    made = [part for part in (target, *target.parents) if not part.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle = locks.lock(target / _LOCK, shared=shared)
        for _ in range(_TRIES):  # who clears holds it for a moment
            if handle is None:
                time.sleep(_PAUSE)
                handle = locks.lock(target / _LOCK, shared=shared)
    except OSError as problem:
        raise error(
            f"expected an output folder that can be written, got {str(folder)!r}: {problem.strerror}. Choose another."
        ) from problem
    if handle is None:
        raise error(
            f"expected a folder that nobody else is writing to, got {str(folder)!r}, in which {locks.who(target / _LOCK)} is. "
            "Wait for it, or choose another."
        )
    held.add(target)
    try:
        try:
            locks.tell(handle, target.name)
        except OSError as problem:
            raise error(
                f"expected an output folder that can be written, got {str(folder)!r}: {problem.strerror}. Free space, or choose "
                "another."
            ) from problem
        clear_leavings(target)
        yield target
    finally:
        held.discard(target)
        locks.unlock(handle, target / _LOCK, shared=shared)
        for part in made:
            with contextlib.suppress(OSError):  # it holds something
                part.rmdir()


# ---- what a death leaves behind ----


@contextmanager
def scratch(target: Place) -> Iterator[Path]:
    """A folder beside the target, to prepare it in; gone at the end, and cleared by the next run if this one dies.

    Raises:
        OSError: it cannot be made.
    """
    place = Path(target)
    clear_leavings(place.parent)
    handle = None
    while handle is None:  # somebody who clears may take a folder that holds no lock yet
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}{_MARK}", dir=place.parent))
        with contextlib.suppress(FileNotFoundError):
            handle = locks.lock(folder / _LOCK)
    try:
        locks.tell(handle, place.name)
        yield folder
    finally:
        _remove(folder)
        os.close(handle)


def clear_leavings(folder: Place) -> None:
    """Remove the scratch and the lock of processes that died, and put back what one of them had moved aside."""
    lock = Path(folder) / _LOCK
    with contextlib.suppress(OSError):  # another user's, or gone
        if lock.exists() and (handle := locks.lock(lock)) is not None:
            locks.unlock(handle, lock)
    for path in Path(folder).glob(f".*{_MARK}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            handle = locks.lock(path / _LOCK)
        except OSError:  # another user's, or gone
            continue
        if handle is not None:
            _remove(path)
            os.close(handle)


def _remove(folder: Path) -> None:
    """Delete a scratch folder; a user's earlier results in it go back to their place, if that is empty."""
    old, told = folder / _OLD, locks.read(folder / _LOCK)
    if old.exists():
        target = folder.parent / Path(str(told.get("target", ""))).name
        if target == folder.parent:  # whose it is cannot be read: never deleted
            return
        if not os.path.lexists(target):
            os.rename(old, target)
    shutil.rmtree(folder, ignore_errors=True)
