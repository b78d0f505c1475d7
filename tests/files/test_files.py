"""One writer: regular files only, whole or not at all, with the mode they had; folders all at once; leavings of the dead known and cleared."""

import json
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from basin_lens import files, locks
from basin_lens.errors import MergeError, StoreError


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def _umask():
    """What a careful user's shell has."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_a_new_file_has_the_umasks_mode_and_a_replaced_one_keeps_its_own(tmp_path):
    files.write_file(tmp_path / "new", "one")
    assert mode(tmp_path / "new") == 0o640
    (tmp_path / "new").chmod(0o604)
    files.write_file(tmp_path / "new", b"two")
    assert mode(tmp_path / "new") == 0o604 and (tmp_path / "new").read_bytes() == b"two"
    with files.new_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
    assert mode(tmp_path / "folder") == 0o750
    assert names(tmp_path) == ["folder", "new"]


def test_a_secret_stays_one(tmp_path):
    """From its first byte on: while it is written, nobody else can reach it."""
    secret, seen = tmp_path / "secret", []
    secret.write_text("x")
    secret.chmod(0o600)
    files.write_file(tmp_path / "out", lambda path: (seen.append(mode(path.parent)), path.write_text("x")), like=secret)
    assert mode(tmp_path / "out") == 0o600 and seen == [0o700]
    (tmp_path / "open").write_text("")
    files.write_file(tmp_path / "open", "x", like=secret)
    assert mode(tmp_path / "open") == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "theirs"
    path.write_text("x")
    os.chown(path, 12, 34)
    files.write_file(path, "y")
    assert (path.stat().st_uid, path.stat().st_gid) == (12, 34)


def test_a_group_that_cannot_be_kept_gets_what_everybody_has(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("x")
    path.chmod(0o664)

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    files.write_file(path, "y")
    assert mode(path) == 0o644


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt, RuntimeError("boom")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def half(new: Path) -> None:
        new.write_text("ha")
        raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error) if isinstance(error, Exception) else error):
        files.write_file(path, half)
    assert names(tmp_path) == ["file"] and path.read_text() == "old"


def test_never_onto_the_input_by_whatever_name(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.write_text("mine")
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "to").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with source.open("rb") as opened:
        for read in (source, opened.fileno()):
            for name in ("in", "./in", "hard", "soft", "to/in"):
                with pytest.raises(StoreError, match="other than the input"):
                    files.write_file(name, "x", inputs=[read])
    assert source.read_text() == "mine"


def test_a_line_is_added_to_a_file_and_never_through_a_link(tmp_path):
    for line in ("one", "é"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\né\n"
    (tmp_path / "link").symlink_to(tmp_path / "log")
    for place in (tmp_path / "link", tmp_path, tmp_path / "none" / "log"):
        with pytest.raises(StoreError):
            files.append_line(place, "x")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\né\n"


def test_never_through_a_link_nor_in_place_of_a_folder(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "nowhere").symlink_to("none")
    (tmp_path / "folder").mkdir()
    for name, words in [("link", "a link to"), ("nowhere", "a link to"), ("folder", "a folder"), ("no/file", "Make it first")]:
        with pytest.raises(StoreError, match=words):
            files.write_file(tmp_path / name, "x")
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / "link").is_symlink()
    with pytest.raises(StoreError, match="not there yet"):
        files.write_file(tmp_path / "theirs", "x", replace=False)


def test_pipes_and_devices_are_written_through(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.write_file(pipe, b"through")
    reader.join(10)
    assert got == [b"through"] and stat.S_ISFIFO(os.stat(pipe).st_mode) and names(tmp_path) == ["pipe"]
    files.write_file("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(StoreError, match="No space left"):
        files.write_file("/dev/full", b"x")


def test_streams_of_this_process_go_where_they_lead(tmp_path):
    """Behind what is there already; a function that writes to a path is served, too."""
    with (tmp_path / "out").open("ab") as out:
        out.write(b"first ")
        out.flush()
        files.write_file(f"/dev/fd/{out.fileno()}", lambda path: path.write_text("second"))
        with pytest.raises(StoreError, match="other than the input"):
            files.write_file(f"/dev/fd/{out.fileno()}", "x", inputs=[tmp_path / "out"])
    assert (tmp_path / "out").read_text() == "first second"
    assert files.is_stream("/dev/stdout") and not files.is_stream(tmp_path / "out")


def test_a_terminal_is_known_as_one():
    main, side = os.openpty()
    try:
        assert files.is_terminal(os.ttyname(side)) and files.is_terminal(f"/dev/fd/{side}") and not files.is_terminal("/dev/null")
    finally:
        os.close(main)
        os.close(side)


# -- folders --------------------------------------------------------------------------------------------------------------------------------


def study(folder: Path, text: str) -> None:
    (folder / "tables").mkdir()
    (folder / "tables" / "a").write_text(text)


def test_a_folder_appears_whole_and_replaces_an_earlier_one(tmp_path):
    target = tmp_path / "deep" / "study"
    for text in ("one", "two"):
        with files.new_folder(target, replace=True) as folder:
            study(folder, text)
            assert target.exists() == (text == "two")
        assert (target / "tables" / "a").read_text() == text
        target.chmod(0o711)
    assert names(target.parent) == ["study"] and mode(target) == 0o711
    with pytest.raises(StoreError, match="which exists"), files.new_folder(target):
        pass


@pytest.mark.parametrize("at", ["filling", "checking", "first rename", "between", "second rename"])
def test_a_folder_that_is_not_finished_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    target, real, calls = tmp_path / "study", os.rename, []
    target.mkdir()
    study(target, "old")

    def refuse(_):
        raise StoreError("others' files")

    def rename(source, place):
        calls.append(place)
        if at == ("first rename", "second rename")[min(len(calls), 2) - 1] and len(calls) < 3:
            raise OSError(28, "No space left on device")
        real(source, place)
        if at == "between" and len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    expected = {"filling": RuntimeError, "between": KeyboardInterrupt}.get(at, StoreError)

    def act() -> None:
        with files.new_folder(target, replace=True, check=refuse if at == "checking" else None) as folder:
            study(folder, "new")
            if at == "filling":
                raise RuntimeError

    with pytest.raises(expected):
        act()
    assert names(tmp_path) == ["study"] and (target / "tables" / "a").read_text() == "old"


# -- death -------------------------------------------------------------------------------------------------------------------------------------


def die(act) -> None:
    """In a process of its own that is killed where `act` kills it."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_at(monkeypatch, name: str, count: int):
    """Before call number `count` of a function of `os`."""
    real, calls = getattr(os, name), []

    def deadly(*given, **options):
        calls.append(given)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **options)

    monkeypatch.setattr(os, name, deadly)


@pytest.mark.parametrize(("call", "count"), [("rename", 1), ("rename", 2), ("fsync", 1), ("chmod", 1), ("rmdir", 1)])
def test_a_death_while_a_folder_is_replaced_is_healed(tmp_path, monkeypatch, call, count):
    target = tmp_path / "study"
    target.mkdir()
    study(target, "old")

    def act():
        with files.new_folder(target, replace=True) as folder:
            study(folder, "new")

    with monkeypatch.context() as patched:
        kill_at(patched, call, count)
        die(act)
    assert any(name.startswith(".study.basin-lens-") for name in names(tmp_path))
    files.clear_leavings(tmp_path)
    assert names(tmp_path) == ["study"]
    assert (target / "tables" / "a").read_text() == ("new" if call == "rmdir" else "old")


def test_leavings_go_with_the_next_write_and_the_livings_stay(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_at(patched, "replace", 1)
        die(lambda: files.write_file(tmp_path / "table", "half"))
    left = names(tmp_path)
    assert len(left) == 1 and left[0].startswith(".table.basin-lens-")
    (tmp_path / ".basin-lens-notes").mkdir()
    (tmp_path / ".basin-lens-notes" / "mine").write_text("a user's folder, alike but for its name")
    with files.new_folder(tmp_path / "other") as alive:
        files.write_file(tmp_path / "table", "whole")
        assert alive.is_dir() and left[0] not in names(tmp_path)
    assert names(tmp_path) == [".basin-lens-notes", "other", "table"]


def test_a_folder_is_one_writers(tmp_path):
    out, entered, done = tmp_path / "out", threading.Event(), threading.Event()

    def other():
        with files.lock_folder(out):
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    for error in (StoreError, MergeError):
        with (
            pytest.raises(error, match=rf"nobody else.*process {os.getpid()} on .*since 2\d\d\d-.*Wait for it"),
            files.lock_folder(out, error),
        ):
            pass
    done.set()
    thread.join(10)
    with files.lock_folder(out), files.lock_folder(tmp_path / "to" / ".." / "out"):  # its holder may again
        (out / "result").write_text("x")
    assert names(tmp_path) == ["out"] and names(out) == ["result"]


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    def act():
        with files.lock_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    die(act)
    assert json.loads((tmp_path / "out" / ".basin-lens.lock").read_text())["pid"] != os.getpid()
    with files.lock_folder(tmp_path / "out") as out:
        (out / "result").write_text("x")
    assert names(tmp_path / "out") == ["result"]


def test_a_folder_in_which_nothing_was_put_is_removed(tmp_path):
    with pytest.raises(RuntimeError), files.lock_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can be written"), files.lock_folder(tmp_path / "file" / "out"):
        pass


def test_without_locks_of_the_system_the_file_decides(tmp_path, monkeypatch):
    """As on some network file systems."""

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    lock = tmp_path / ".basin-lens.lock"
    told = {"pid": os.getppid(), "host": locks.socket.gethostname(), "since": "x", "target": "x"}
    for change, free in [({}, False), ({"host": "another"}, False), ({"pid": 2**22 + 1}, True)]:
        lock.write_text(json.dumps(told | change))
        if free:
            with files.lock_folder(tmp_path):
                pass
            assert not lock.exists()
        else:
            with pytest.raises(StoreError, match="nobody else"), files.lock_folder(tmp_path):
                pass
