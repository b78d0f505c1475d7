"""Supplements: all that is needed in one file, the same each time; and strangers' files are refused."""

import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from basin_lens import tables
from basin_lens.errors import StoreError, TableError
from basin_lens.tables.bundles import tokens_hash

TOKENS = [[5, 6, 7], [8, 9]]


def table(**more) -> pd.DataFrame:
    """Two sequences at two layers, with a label and one score."""
    seq, pos = [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]
    one = pd.DataFrame(
        {"run": "r", "passage": seq, "doc": [f"d{s}" for s in seq], "seq": seq, "pos": pos, "kind": ["a"] * 3 + [None] * 2}
    ).assign(token_id=[token for tokens in TOKENS for token in tokens])
    both = pd.concat([one.assign(layer=layer, a=np.arange(5.0)) for layer in (3, 4)], ignore_index=True)
    made = {
        "date": "2026-01-02T03:04:05Z",
        "basin_lens": "0.1.0",
        "versions": {"numpy": "2.0.0"},
        "command": ["basin-lens", "analyze", "my text.txt"],
    }
    facts = tables.Provenance(texts=tokens_hash(TOKENS), columns={"a": tables.Column("nats")}, made=made, layers=(3, 4), **more)
    return tables.described(both, {"r": facts})


def contents(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_supplement_holds_table_provenance_tokens_and_words(tmp_path):
    wanted = table()
    figure = Figure()
    figure.add_subplot().set_title("a title")
    (tmp_path / "map.png").write_bytes(b"picture")
    tables.bundle(wanted, tmp_path / "s.zip", figures=[figure, tmp_path / "map.png"])
    parts = contents(tmp_path / "s.zip")
    assert set(parts) == {
        "README.txt", "figures/figure-1.pdf", "figures/map.png", "provenance.json", "requirements.txt", "rerun.json", "table.csv", "table.parquet",
    }  # fmt: skip
    assert parts["requirements.txt"] == b"basin-lens==0.1.0\nnumpy==2.0.0\n"
    assert json.loads(parts["provenance.json"]) == tables.provenance(wanted)
    assert b"basin-lens analyze 'my text.txt'" in parts["README.txt"]
    assert b"/Type3" not in parts["figures/figure-1.pdf"] and parts["figures/map.png"] == b"picture"
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(parts["table.parquet"])), wanted)
    held = tables.read_bundle(tmp_path / "s.zip")
    pd.testing.assert_frame_equal(held.table, wanted)
    assert tables.provenance(held.table) == tables.provenance(wanted)
    assert [one["tokens"] for one in held.runs["r"]["sequences"]] == TOKENS
    assert [(one["doc"], one["labels"]) for one in held.runs["r"]["sequences"]] == [("d0", {"kind": "a"}), ("d1", {"kind": None})]
    assert held.figures == ("figures/figure-1.pdf", "figures/map.png") and held.texts == ()


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name in "ab":
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        tables.bundle(table(), tmp_path / f"{name}.zip", figures={"line": figure})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_texts_are_in_it_only_if_asked_for(tmp_path):
    tables.bundle(table(), tmp_path / "s.zip", texts=["Grüße", "two"])
    parts = contents(tmp_path / "s.zip")
    assert parts["texts/00000.txt"].decode() == "Grüße" and parts["texts/00001.txt"] == b"two"


def test_a_table_that_lacks_tokens_says_that_it_cannot_be_run_again(tmp_path):
    whole = table()
    for name, some, why in (("a", whole[whole.pos > 0], "lacks some"), ("b", whole.drop(columns="token_id"), "no column token_id")):
        tables.bundle(tables.with_provenance(some, whole), tmp_path / f"{name}.zip")
        run = tables.read_bundle(tmp_path / f"{name}.zip").runs["r"]
        assert run["sequences"] is None and why in run["why"]
        assert why.encode() in contents(tmp_path / f"{name}.zip")["README.txt"]


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"ending in \.zip"):
        tables.bundle(table(), tmp_path / "s.tar")
    with pytest.raises(StoreError, match="figure's file"):
        tables.bundle(table(), tmp_path / "s.zip", figures=[tmp_path / "none.png"])
    with pytest.raises(TableError, match="file name of letters"):
        tables.bundle(table(), tmp_path / "s.zip", figures={"../up": Figure()})
    assert list(tmp_path.iterdir()) == []


def packed(path, parts) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/passwd", "figures/../../x", "a\\b", "C:x", "figures/a/b", ".hidden", "x" * 200]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    tables.bundle(table(), tmp_path / "s.zip")
    packed(tmp_path / "evil.zip", [*contents(tmp_path / "s.zip").items(), (name, b"evil")])
    with pytest.raises(StoreError, match="expected a supplement"):
        tables.read_bundle(tmp_path / "evil.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip", "s.zip"]


def test_damage_and_other_files_are_refused_in_our_words(tmp_path):
    tables.bundle(table(), tmp_path / "s.zip")
    good = contents(tmp_path / "s.zip")

    def refused(why):
        with pytest.raises(StoreError, match=why):
            tables.read_bundle(tmp_path / "bad.zip")

    for name in good:  # each file, changed or missing
        packed(tmp_path / "bad.zip", [(n, c + b" " if n == name else c) for n, c in good.items()])
        refused("changed after it was written|damaged|no JSON|digest")
        packed(tmp_path / "bad.zip", [(n, c) for n, c in good.items() if n != name])
        refused("without")
    packed(tmp_path / "bad.zip", [*good.items(), ("more.txt", b"not listed")])
    refused("more.txt was changed")
    packed(tmp_path / "bad.zip", [*good.items(), ("more.txt", b"0" * (1 << 25))])
    refused("unpacks to")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    refused("no zip file")
    (tmp_path / "bad.zip").write_bytes((tmp_path / "s.zip").read_bytes()[:-30])
    refused("no zip file")
    with pytest.raises(StoreError, match="cannot be read"):
        tables.read_bundle(tmp_path / "none.zip")
