"""The command line: errors of one line, exit codes, whole results or none."""

import os
import signal
import subprocess
import sys
import threading

import pandas as pd
import pytest

from basin_lens import files, tables
from basin_lens.cli import options as cli_options
from basin_lens.cli import runs
from tests.cli.calls import call


def test_analyze_writes_table_summary_and_report(folder, tmp_path, capsys):
    out = tmp_path / "out"
    text = str(folder.parent / "text.txt")
    code, said, _ = call("analyze", text, "--model", str(folder), "--layers", "0,2", "--k", "5", "--out", str(out), capsys=capsys)
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["pieces", "report.html", "summary.csv", "table"]
    table = tables.open(out).load()
    assert table["layer"].unique().tolist() == [0, 2]
    assert table["compression"].notna().any()
    assert pd.read_csv(out / "summary.csv")["layer"].tolist() == [0, 2]
    assert str(out / "report.html") in said
    # Another run is refused there, and says how to start over; the same one is finished.
    other = ("analyze", text, "--model", str(folder), "--layers", "1", "--k", "5", "--out", str(out))
    code, _, err = call(*other, capsys=capsys)
    assert code == 1 and "layers differ ([0, 2] there, [1] asked for)" in err and "--fresh" in err
    assert tables.open(out).layers == (0, 2)
    assert call(*other, "--fresh", capsys=capsys)[0] == 0
    assert tables.open(out).layers == (1,) and pd.read_csv(out / "summary.csv")["layer"].tolist() == [1]
    before = (out / "report.html").read_bytes()
    assert call(*other, capsys=capsys)[0] == 0
    assert (out / "report.html").read_bytes() == before


def test_bad_calls_say_one_line_and_fail(folder, tmp_path, capsys):
    text = str(folder.parent / "text.txt")
    (tmp_path / "taken").write_text("x")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("x")
    for arguments, expected in [
        (("analyze", str(tmp_path / "no.txt")), "does not exist"),
        (("analyze", text, "--model", str(tmp_path / "no.gguf"), "--out", str(tmp_path / "a")), "does not exist"),
        (("analyze", text, "--out", str(tmp_path / "taken" / "x")), "output folder"),
        (("analyze", text, "--out", str(tmp_path / "others")), "thesis.tex"),
        (("analyze", text, "--model", str(folder), "--k", "100000", "--out", str(tmp_path / "b")), "expected k"),
        (("analyze", text, "--model", str(folder), "--layers", "99", "--out", str(tmp_path / "c")), "layers between 0 and 2"),
        (("analyze", text, "--model", str(folder), "--layers", "x", "--out", str(tmp_path / "d")), "expected layers"),
        (("nonsense",), "No such command"),
    ]:
        code, _, err = call(*arguments, capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("basin-lens:")]
        assert code != 0, arguments
        assert len(lines) == 1, err
        assert expected in lines[0], lines
        assert "Traceback" not in err
    assert (tmp_path / "others" / "thesis.tex").exists()
    assert not any((tmp_path / name).exists() and list((tmp_path / name).iterdir()) for name in "abcd")


@pytest.mark.parametrize("command", [(), ("demo",), ("analyze",), ("study",), ("info",)])
def test_help_has_an_example(command, capsys):
    code, out, _ = call(*command, "--help", capsys=capsys)
    assert code == 0
    assert "basin-lens" in out
    if command:
        assert "Example" in out


def test_info(capsys):
    code, out, _ = call("info", capsys=capsys)
    assert code == 0
    assert "transformer-lens" in out


@pytest.mark.slow
def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "basin_lens.cli", "--help"], capture_output=True, text=True, check=True)
    assert "analyze" in done.stdout


# -- folders and endings -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_that_is_told_to_end_clears_up(folder, tmp_path, capsys, monkeypatch, request, number, code):
    """While it writes its results."""
    # Under nohup, where these tests may run too, SIGHUP is ignored from the start.
    inherited = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    out = tmp_path / "to" / "out"
    words = ("analyze", str(folder.parent / "text.txt"), "--model", str(folder), "--layers", "1", "--k", "5", "--out", str(out))
    real = tables.save_csv

    def end(*given):
        os.kill(os.getpid(), number)
        real(*given)

    monkeypatch.setattr(tables, "save_csv", end)
    found, _, err = call(*words, capsys=capsys)
    assert found == code and err.splitlines()[-1] == f"basin-lens: ended by {number.name}" and "Traceback" not in err
    # What it had done stays, and nothing else: the same command goes on from there.
    assert sorted(path.name for path in out.iterdir()) == ["pieces", "table"]
    assert signal.getsignal(number) == signal.SIG_DFL
    # As under nohup.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert call(*words, capsys=capsys)[0] == 0
    finally:
        signal.signal(number, before)


def test_a_folder_that_another_command_writes_to_is_refused(folder, tmp_path, capsys, monkeypatch):
    text, out, entered, done = str(folder.parent / "text.txt"), tmp_path / "out", threading.Event(), threading.Event()

    def other():
        with files.lock_folder(out):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    monkeypatch.setattr(cli_options, "load", lambda _: pytest.fail("loaded"))
    try:
        for command in ("analyze", "study", "merge", "codec-bench"):
            words = {"study": ["layers"], "merge": ["train"]}.get(command, [])
            code, _, err = call(command, *words, text, "--out", str(out), capsys=capsys)
            assert code == 1 and f"process {os.getpid()} on" in err and "Wait for it" in err
    finally:
        done.set()
        thread.join()


def test_results_go_to_no_folder_in_which_one_stands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("analyze", str(folder.parent / "text.txt"), "--model", str(folder), "--out", ".", capsys=capsys)
    assert code == 1 and "in which you stand" in err and list(tmp_path.iterdir()) == []


def test_one_document_has_no_interval(capsys):
    """It was printed as "+nan +nan"."""
    row = {"layer": 3, "n_documents": 1, "n_sequences": 2, "n_tokens": 9, "compression_reliability": 0.5, "compression_nan": 0.0}
    scores = ("compression", "compression_random_sets", "compression_isotropic", "contraction")
    row |= {f"{name}_mean": 0.25 for name in scores}
    row |= {"compression_low": float("nan"), "compression_high": float("nan")}
    runs.print_summary(pd.DataFrame([row]), {"model": {"name": "tiny"}, "check_error": {"patched": 1e-7}}, [])
    said = capsys.readouterr().out
    assert "none (1 document)" in said and "nan" not in said and "+0.250" in said
