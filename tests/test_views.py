"""What a person sees: pages that are harmless, offline, and say what they show."""

import json
import re

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.analysis import score
from tests.conftest import TEXTS

NASTY = ["</script><b>bold</b><script>", "<img src=x onerror=a(2)>\r\nline\ttwo <!-- -->"]
WHOLE = "</script><b>bold</b><script>alert(1)</script><!--"  # as one token, as a vocabulary may hold it


@pytest.fixture(scope="module")
def run(llama):
    headline = bl.analyzers.Compression(k=5)
    return score(
        llama,
        [*TEXTS, *NASTY],
        [headline, bl.analyzers.RawCompression(k=5), bl.analyzers.Neighborhood(k=5), bl.analyzers.Surprisal()],
        keep_neighbors_of=headline,
        progress=False,
    )


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def test_report_holds_the_tables_own_numbers(run):
    import base64

    data = data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)
    index = [s["name"] for s in data["scores"]].index("compression")
    packed = data["values"][index][1]
    steps = np.frombuffer(base64.b64decode(packed["data"]), "<u2")
    shown = np.where(steps == 65535, np.nan, packed["low"] + steps * (packed["high"] - packed["low"]) / 65534)
    expected = run.table[run.table.layer == data["layers"][1]]["compression"].to_numpy()
    np.testing.assert_allclose(shown, expected, atol=(packed["high"] - packed["low"]) / 65534)
    words = [data["strings"][t] for s in data["sequences"] for t in s["tokens"]]
    assert words == run.table[run.table.layer == 0]["token"].tolist()


def test_report_holds_the_neighbors_that_neighborhood_finds(run, llama):
    capture = bl.Capture.from_texts(llama, [*TEXTS, *NASTY], progress=False)
    row = capture.row_of(2, 7)
    found = bl.neighborhood(llama, capture, layer=1, seq=2, pos=7, k=5)
    kept = run.neighbors
    assert [kept.bank["seq"][i] for i in kept.rows[1, row]] == found["seq"].tolist()
    assert [kept.bank["pos"][i] for i in kept.rows[1, row]] == found["pos"].tolist()
    np.testing.assert_allclose(kept.after[1, row], found["distance_after"], rtol=1e-4)


@pytest.mark.parametrize("make", ["report", "tokens"])
def test_text_never_becomes_markup(run, make):
    table = run.table.copy()
    table.loc[(table.seq == len(TEXTS)) & (table.pos == 3), "token"] = WHOLE
    if make == "report":
        page = bl.views.make_report(table, neighbors=run.neighbors, title="<b>title</b>").html
        assert "<b>title" not in page
        body = page.split('id="data">')[1].split("</script>")[0]
    else:
        page = bl.views.token_view(table, "compression", layer=1, seq=len(TEXTS)).html
        body = page[page.index("CircuitsVis.render(") :].split("</script>")[0]
    # The texts are there, as data, to the end: nothing in them closed the script element.
    assert "alert" in body
    assert "<b" not in body
    assert "<script" not in body
    assert "<img" not in body


def test_pages_name_no_outside_site(run, tmp_path):
    page = bl.views.make_report(run.table, neighbors=run.neighbors).html
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)
    assert "default-src 'none'" in page
    view = bl.views.token_view(run.table, "compression", layer=1)
    assert "unpkg.com" not in view.html
    view.save(tmp_path / "view.html")
    saved = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert saved.count("CircuitsVis.render(") == 1
    assert view._repr_html_() == view.html


def test_token_view_centers_a_score_of_one_sign(run):
    rows = run.table[(run.table.layer == 1) & (run.table.seq == 0)]["surprisal"]
    view = bl.views.token_view(run.table, "surprisal", layer=1)
    shown = json.loads(re.search(r'"values": (\[.*?\])', view.html).group(1))
    np.testing.assert_allclose(shown[1:], rows.iloc[1:] - rows.median(), atol=1e-6)
    assert f"White is {rows.median():.3g}" in view.html


def test_token_view_marks_tokens_without_a_score(run):
    view = bl.views.token_view(run.table, "compression", layer=1)
    tokens = json.loads(re.search(r'"tokens": (\[.*?\]), "values"', view.html, re.S).group(1))
    assert tokens[0].startswith("<em>")
    assert not any(token.startswith("<em>") for token in tokens[1:])


def test_layer_curve_shows_the_summary(run):
    figure = bl.views.layer_curve(run.table, "compression")
    axes = figure.axes[0]
    summary = tables.layer_summary(run.table, ["compression"])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), summary["compression_mean"])
    assert axes.get_xlabel() == "layer"
    assert axes.get_ylabel() == "compression [nats]"
    assert axes.collections, "the interval over documents is drawn"


def test_layer_curve_of_one_document_says_it_has_no_interval(llama):
    table = bl.analyze(llama, bl.Passage(TEXTS[0], doc="one"), [bl.analyzers.Surprisal()], progress=False)
    figure = bl.views.layer_curve(table, "surprisal")
    assert not figure.axes[0].collections
    assert "no interval" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_layer_summary_weighs_documents_equally(llama):
    passages = [bl.Passage(TEXTS[0], doc="a"), bl.Passage(TEXTS[1], doc="a"), bl.Passage(TEXTS[2], doc="b")]
    table = bl.analyze(llama, passages, [bl.analyzers.StateNorm()], layers=[1], progress=False)
    per_sequence = table.groupby("seq")["state_norm"].mean()
    documents = np.array([per_sequence[[0, 1]].mean(), per_sequence[2]])
    line = tables.layer_summary(table).iloc[0]
    assert line["state_norm_mean"] == pytest.approx(documents.mean())
    half = 12.706 * documents.std(ddof=1) / np.sqrt(2)
    assert line["state_norm_low"] == pytest.approx(documents.mean() - half, rel=1e-3)


def test_tables_round_trip_and_concat_keep_provenance(run, llama, tmp_path):
    tables.save(run.table, tmp_path / "t.parquet")
    again = tables.load(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(again, run.table)
    assert tables.provenance(again) == json.loads(json.dumps(tables.provenance(run.table)))
    other = bl.analyze(llama, TEXTS, [bl.analyzers.Surprisal()], progress=False)
    both = tables.concat([run.table, other])
    assert set(tables.provenance(both)) == set(both["run"]) == {run.table["run"].iloc[0], other["run"].iloc[0]}
    with pytest.raises(bl.errors.TableError, match="one run"):
        bl.views.layer_curve(both, "surprisal")
    with pytest.raises(bl.errors.TableError, match="one run"):
        bl.views.make_report(both)


@pytest.mark.parametrize(
    ("column", "layer", "seq"), [("nope", 1, None), ("compression", 99, None), ("compression", 1, 99), ("pos", 1, 0)]
)
def test_token_view_refuses_what_is_not_there(run, column, layer, seq):
    with pytest.raises(bl.errors.TableError):
        bl.views.token_view(run.table, column, layer, seq=seq)


def test_save_refuses_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(bl.errors.StoreError):
        bl.views.make_report(run.table).save(tmp_path / "file" / "report.html")
    with pytest.raises(bl.errors.StoreError):
        bl.views.token_view(run.table, "compression", 1).save(tmp_path / "no" / "view.html")
    with pytest.raises(bl.errors.StoreError):
        tables.save(run.table, tmp_path / "no" / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
