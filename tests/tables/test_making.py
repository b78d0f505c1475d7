"""When, with what and by which call a run was made."""

import subprocess
import sys
import types
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.tables import making
from tests.tables.test_frame import made


def test_the_date_is_now_in_utc_and_versions_are_those_installed():
    facts = tables.made_now()
    when = datetime.strptime(facts["date"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(when - datetime.now(UTC)) < timedelta(minutes=1)
    assert facts["basin_lens"] == bl.__version__
    for name in ("numpy", "scipy", "pandas", "torch", "transformer-lens"):
        assert facts["versions"][name] == version(name)
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["python"] == sys.version.split()[0]


@pytest.mark.parametrize(
    ("first", "module", "expected"),
    [
        ("/usr/bin/basin-lens", None, ["basin-lens", "demo", "--out", "x"]),
        ("basin-lens.exe", None, ["basin-lens", "demo", "--out", "x"]),
        ("/a/basin_lens/cli/__main__.py", "basin_lens.cli.__main__", ["basin-lens", "demo", "--out", "x"]),
        ("/usr/lib/ipykernel_launcher.py", "ipykernel_launcher", None),
        ("my_study.py", None, None),
    ],
)
def test_the_command_line_is_that_of_the_command_alone(monkeypatch, first, module, expected):
    main = types.ModuleType("__main__")
    main.__spec__ = None if module is None else types.SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [first, "demo", "--out", "x"])
    assert making.command_line() == expected


def test_the_commit_is_that_of_a_checkout_of_this_package(tmp_path):
    assert making.checkout(tmp_path / "none") == (None, None)
    root = tmp_path / "checkout"
    (root / "basin_lens").mkdir(parents=True)
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "basin_lens" / "a.py").write_text("a = 1\n")
    (root / "notes.txt").write_text("a\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert making.checkout(root) == (None, None), "a repository around an installed package is another project's"
    (root / "pyproject.toml").write_text("")
    making.checkout.cache_clear()
    assert making.checkout(root) == (commit, False), "only the package's own files count"
    (root / "basin_lens" / "a.py").write_text("a = 2\n")
    making.checkout.cache_clear()
    assert making.checkout(root) == (commit, True)
    making.checkout.cache_clear()


def test_a_run_s_name_does_not_depend_on_when_it_was_made(monkeypatch, llama):
    def run():
        return bl.analyze(llama, [[5, 6, 7, 8]], [bl.analyzers.StateNorm()], progress=False)

    first = run()
    monkeypatch.setattr(making, "package_version", lambda: "9.9")
    second = run()
    assert first["run"].equals(second["run"])
    (one,), (two,) = tables.runs(first).values(), tables.runs(second).values()
    assert one.made["basin_lens"] == bl.__version__ and two.made["basin_lens"] == "9.9"
    assert one.made["loaded"] is None, "this model was not made by load_model"


def test_pandas_alone_reads_the_provenance(tmp_path):
    table = tables.concat([made(0), made(1)])
    tables.save(table, tmp_path / "t.parquet")
    plain = pd.read_parquet(tmp_path / "t.parquet")
    assert plain.attrs == {"provenance": tables.provenance(table)}
    assert tables.provenance(plain) == tables.provenance(tables.load(tmp_path / "t.parquet"))
