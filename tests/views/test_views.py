"""What a person sees: pages that are harmless, offline, and say what they show."""

import base64
import dataclasses
import json
import re
import zlib

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import tables
from tests.conftest import TEXTS
from tests.views.drawn import NASTY, WHOLE


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def numbers(packed: dict) -> np.ndarray:
    """What `explorer/decode.mjs` reads, in Python, from the page's own words for it."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), "u1").reshape(packed["width"], -1)
    whole = (planes.astype(int).T * 256 ** np.arange(packed["width"])).sum(1)
    if "middle" not in packed:
        return whole - 1
    if packed["run"] > 1:
        whole = whole.reshape(-1, packed["run"]).cumsum(1).ravel() % 256
    bent = packed["low"] + (whole - 1) * (packed["high"] - packed["low"]) / (packed["steps"] - 1)
    values = np.clip(packed["middle"] + packed["spread"] * np.sinh(bent), packed["least"], packed["most"])
    exact = {0: np.nan, 1: packed["least"], packed["steps"]: packed["most"], packed["zero"]: 0.0}
    return np.select(
        [whole == step for step in exact if step is not None], [v for step, v in exact.items() if step is not None], values
    )


def agrees(packed: dict, expected: np.ndarray) -> None:
    """Half a step, where steps are even in asinh((value - middle) / spread), and NaN where the table has it."""
    step = (packed["high"] - packed["low"]) / (packed["steps"] - 1)

    def bent(values):
        return np.arcsinh((values - packed["middle"]) / packed["spread"])

    np.testing.assert_allclose(bent(numbers(packed)), bent(expected), rtol=0, atol=0.5 * step + 1e-9)


def test_report_holds_the_tables_own_numbers(run):
    data = data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)
    for index, score in enumerate(data["scores"]):
        for place, layer in enumerate(data["layers"]):
            packed = data["arrays"][data["values"][index][place]]
            agrees(packed, run.table[run.table.layer == layer][score["name"]].to_numpy())
            # Near the median, less than a hundredth of the spread of the middle half.
            assert packed["high"] - packed["low"] < 0.01 * packed["steps"]
    words = [data["strings"][code] for code in data["rows"]]
    assert words == run.table[run.table.layer == 0]["token"].tolist()
    # What every layer shares is there once.
    surprisal = data["values"][[score["name"] for score in data["scores"]].index("surprisal")]
    assert len(set(surprisal)) == 1 and len(data["arrays"]) < len(data["scores"]) * len(data["layers"])


def test_report_holds_its_neighbors_own_numbers(run):
    kept, data = run.neighbors, data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)["neighbors"]
    assert (data["k"], data["shown"]) == (5, 5)
    for place in range(len(kept.rows)):
        np.testing.assert_array_equal(numbers(data["rows"][place]), kept.rows[place].ravel())
        agrees(data["before"][place], kept.before[place].ravel().astype(float))
        agrees(data["after"][place], kept.after[place].ravel().astype(float))


def test_report_shows_the_nearest_of_many_neighbors(run, monkeypatch):
    from basin_lens.views.pages import report

    monkeypatch.setattr(report, "_MOST_NEIGHBORS", 2)
    data = data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)["neighbors"]
    assert (data["k"], data["shown"]) == (5, 2)
    np.testing.assert_array_equal(numbers(data["rows"][1]), run.neighbors.rows[1, :, :2].ravel())
    agrees(data["before"][1], run.neighbors.before[1, :, :2].ravel().astype(float))


@pytest.mark.parametrize(
    "values", [[], [np.nan, np.nan], [3.0], [2.0, 2.0, np.nan], [1.0] * 9 + [1e9], [-np.inf, 1.0, 2.0], np.linspace(-1, 1, 999)]
)
@pytest.mark.parametrize(("steps", "run"), [(1023, 1), (255, 1), (255, 3)])
def test_packed_numbers_come_back(values, steps, run):
    from basin_lens.views.pages.packing import packed_floats

    values = np.asarray(values, float)[: len(values) // run * run]
    agrees(packed_floats(values, steps, run=run), np.where(np.isfinite(values), values, np.nan))


@pytest.mark.parametrize("seed", range(5))
def test_exact_zeros_and_ends_come_back_exactly(seed):
    """A zero of 1e-15 had a sign, and a score without negative values a scale with 0 in its middle."""
    from basin_lens.views.pages.packing import packed_floats

    rng = np.random.default_rng(seed)
    values = np.concatenate([np.zeros(30), rng.gamma(1, 3, 200) - (seed % 2) * 3])
    back = numbers(packed_floats(values, 1023))
    assert (back[values == 0] == 0).all()
    assert (back.min(), back.max()) == (values.min(), values.max())
    falling = -np.sort(-values.reshape(-1, 10))
    runs = numbers(packed_floats(falling, 255, run=10))
    assert (runs.min(), runs.max()) == (values.min(), values.max())


def test_the_page_says_which_scores_have_zero_in_the_middle(run):
    """By the table's numbers at all layers without position 0, and the bounds that a column has."""
    rows = np.arange(len(run.table))
    made = {
        "both": np.where(rows % 2, -1.0, 2.0), "above": rows % 3 + 0.0, "below": -(rows % 3) - 1.0, "dust": np.where(rows % 2, -1e-17, 2.0),
        "sink": np.where(run.table.pos == 0, -5.0, 1.0 + rows % 2), "none": np.nan, "bounded": np.where(rows % 2, -1e-3, 2.0),
    }  # fmt: skip
    table = tables.with_provenance(run.table.assign(**made), run.table)
    bounds = {name: tables.Column("nats", low=0.0 if name == "bounded" else None, rows="token", analyzer="Made") for name in made}
    record = tables.runs(table)[run.table["run"].iloc[0]]
    record = dataclasses.replace(record, columns={**record.columns, **bounds})
    table = tables.described(table, {run.table["run"].iloc[0]: record})
    zero = {score["name"]: score["zero"] for score in data_of(bl.views.make_report(table).html)["scores"]}
    assert {name: zero[name] for name in made} == {name: name == "both" for name in made}
    assert zero["compression"] and not zero["surprisal"]


@pytest.mark.parametrize("most", [0, 254, 255, 65534, 65535, 70_000])
def test_packed_rows_come_back(most):
    from basin_lens.views.pages.packing import packed_rows

    rows = np.array([[-1, 0], [most, most // 2]])
    np.testing.assert_array_equal(numbers(packed_rows(rows)), rows.ravel())


def test_report_holds_the_neighbors_that_neighborhood_finds(run, llama):
    capture = bl.Capture.from_texts(llama, [*TEXTS, *NASTY], progress=False)
    row = capture.row_of(2, 7)
    found = bl.neighborhood(llama, capture, layer=1, seq=2, pos=7, k=5)
    kept = run.neighbors
    assert [kept.bank["seq"][i] for i in kept.rows[1, row]] == found["seq"].tolist()
    assert [kept.bank["pos"][i] for i in kept.rows[1, row]] == found["pos"].tolist()
    np.testing.assert_allclose(kept.after[1, row], found["distance_after"], rtol=1e-4)


def test_a_report_of_a_large_run_shows_its_first_sequences_and_says_so(run, monkeypatch):
    """A page of 3 million rows had 57 MB."""
    from basin_lens.views.pages import report

    whole = data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)
    lengths = [one["length"] for one in whole["sequences"]]
    per_row = len(whole["layers"]) * (len(whole["scores"]) + 3 * 5)
    monkeypatch.setattr(report, "_MOST_VALUES", per_row * (sum(lengths[:2]) + 1))
    page = bl.views.make_report(run.table, neighbors=run.neighbors).html
    part = data_of(page)
    assert [one["length"] for one in part["sequences"]] == lengths[:2]
    words = [[data["strings"][code] for code in data["rows"]] for data in (part, whole)]
    assert words[0] == words[1][: sum(lengths[:2])] and len(part["positions"]) == sum(lengths[:2])
    assert part["curves"] == whole["curves"] and part["of_means"] == whole["of_means"]
    assert f"the first 2 of {len(lengths)} sequences" in part["about"] and "Shown here" not in whole["about"]
    assert [len(numbers(rows)) for rows in part["neighbors"]["rows"]] == [5 * sum(lengths[:2])] * len(part["layers"])
    monkeypatch.setattr(report, "_MOST_VALUES", 1)
    assert len(data_of(bl.views.make_report(run.table).html)["sequences"]) == 1


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


def props_of(html: str) -> dict:
    """What CircuitsVis is given to draw."""
    return json.loads(re.search(r"CircuitsVis\.render\(.*?(\{.*\})\s*\)\s*(document[^<]*)?</script>", html, re.S).group(1))


@pytest.mark.slow
def test_token_view_of_several_scores_puts_them_on_one_scale(run):
    names = ["compression", "surprisal", "raw_compression"]
    view = bl.views.token_view(run.table, names, layer=1, seq=2)
    rows = run.table[(run.table.layer == 1) & (run.table.seq == 2)]
    props = props_of(view.html)
    shown = np.array(props["values"], float)
    assert shown.shape == (len(rows), 3)
    assert props["labels"] == names
    assert props["positiveBounds"] == [1, 1, 1]
    assert props["negativeBounds"] == [-1, -1, -1]
    for place, name in enumerate(names):
        values = rows[name].to_numpy()
        np.testing.assert_array_equal(np.isnan(shown[:, place]), np.isnan(values))
        middle = 0 if np.nanmin(values) < 0 < np.nanmax(values) else np.nanmedian(values)
        bound = np.nanmax(np.abs(values - middle))
        np.testing.assert_allclose(shown[:, place], (values - middle) / bound)
        ends = f"white is {middle:.3g}, full blue (1) is {middle + bound:.3g}, full red (-1) is {middle - bound:.3g}"
        assert f"{name}, in nats: {ends}; {np.isnan(values).sum()} of" in view.html
    assert view.title == "compression, surprisal, raw_compression, layer 1, sequence 2 (text-2)"


def test_token_view_of_several_scores_tells_no_score_from_some(run):
    table = run.table.copy()
    table.loc[(table.layer == 1) & (table.seq == 0) & (table.pos == 4), "compression"] = np.nan
    tokens = props_of(bl.views.token_view(table, ["compression", "surprisal"], layer=1).html)["tokens"]
    known = table[(table.layer == 1) & (table.seq == 0)][["compression", "surprisal"]].notna()
    assert [token[:4] == "<em>" for token in tokens] == (~known.any(axis=1)).tolist()
    assert [token[:3] == "<i>" for token in tokens] == (known.any(axis=1) & ~known.all(axis=1)).tolist()


@pytest.mark.slow
def test_layer_view_holds_every_layer_about_its_middle(run):
    table = run.table[run.table.layer != 1]  # labels are layers, not places in a list
    names = ["compression", "surprisal"]
    view = bl.views.layer_view(table, names, seq=1)
    props = props_of(view.html)
    shown = np.array(props["activations"], float)
    assert props["firstDimensionLabels"] == ["0", "2"]
    assert props["secondDimensionLabels"] == ["compression [nats]", "surprisal [nats]"]
    rows = table[table.seq == 1]
    count = (rows.layer == 0).sum()
    assert shown.shape == (count + 2, 2, 2)
    for at, layer in enumerate((0, 2)):
        for place, name in enumerate(names):
            values = rows[rows.layer == layer][name].to_numpy()
            middle = 0 if name == "compression" else np.nanmedian(values)
            np.testing.assert_allclose(shown[:count, at, place], np.nan_to_num(values - middle))
            bound = np.nanmax(np.abs(values - middle))
            np.testing.assert_allclose(shown[count:, at, place], [-bound, bound])
            assert f"<td>{middle:.3g}</td><td>{bound:.3g}</td><td>{np.isnan(values).sum()}</td>" in view.html
    assert props["tokens"][count:] == ["<small>lowest</small>", "<small>highest</small>"]
    assert view.title == "compression, surprisal, layers 0 to 2, sequence 1 (text-1)"


@pytest.mark.many
@pytest.mark.parametrize("kind", ["several", "layers"])
def test_token_views_of_many_scores_are_harmless_and_refuse_what_is_not_there(run, kind):
    def make(table, columns, seq=None):
        if kind == "several":
            return bl.views.token_view(table, columns, 1, seq=seq)
        return bl.views.layer_view(table, columns, seq=seq)

    table = run.table.copy()
    table.loc[(table.seq == len(TEXTS)) & (table.pos == 3), "token"] = WHOLE
    evil = "</script><b>score"
    table[evil] = table["compression"]
    facts = table.attrs["provenance"][table["run"].iloc[0]]
    facts = facts | {"columns": facts["columns"] | {evil: {"unit": "<b>", "range": None, "analyzer": "X", "rows": "tokens"}}}
    table.attrs = {"provenance": {table["run"].iloc[0]: facts}}
    page = make(table, ["compression", evil], len(TEXTS)).html
    assert page.count("CircuitsVis.render(") == 1
    assert "unpkg.com" not in page
    body = page[page.index("CircuitsVis.render(") :]
    assert body.count("<") == 1, "the end of the script, and nothing else"
    assert "<b>" not in page[: page.index("<script")]
    assert evil in props_of(page)["labels" if kind == "several" else "secondDimensionLabels"][1]
    for columns, seq in ((["nope"], None), ([], None), (["pos"], 0), (["compression"], 99)):
        with pytest.raises(bl.errors.TableError):
            make(run.table, columns, seq)


def test_layer_view_refuses_layers_of_other_tokens(run):
    with pytest.raises(bl.errors.TableError, match="same tokens"):
        bl.views.layer_view(run.table[~((run.table.layer == 2) & (run.table.pos == 4))], "compression")


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
    assert len(bl.views.layer_curve(both, "surprisal").axes[0].lines) == 2
    with pytest.raises(bl.errors.TableError, match="one run"):
        bl.views.make_report(both)


def test_the_page_says_over_how_many_documents_intervals_are_and_when_there_can_be_none(llama):
    def words(texts):
        data = data_of(bl.views.make_report(bl.analyze(llama, texts, [bl.analyzers.Surprisal()], layers=[1], progress=False)).html)
        return data["of_means"], data["curves"][0]["low"][0]

    plain, low = words(TEXTS[:3])
    assert plain == "Mean over documents, 95 % interval (Student's t) over 3 documents." and low is not None
    copied, low = words([*TEXTS[:3], TEXTS[0]])
    assert copied.startswith(plain) and "3 of 4 sequences" in copied and "3 of 4." in copied and low is not None
    one, low = words(TEXTS[:1])
    assert one == "Mean of one document: over documents no interval is possible." and low is None
    same, low = words([TEXTS[0]] * 2)
    assert same.startswith(one) and "1 of 2 sequences" in same and low is None


def other_tokens_at_a_layer(table):
    """Tokens scored at one layer are not those of the next."""
    return table[(table.layer != 1) | (table.seq != 2)], "same tokens at every layer"


def other_words_at_a_layer(table):
    return table.assign(token=table["token"].where(table["layer"] != 2, "x")), "same tokens at every layer"


def rows_twice(table):
    return pd.concat([table, table]), "one row per seq and pos"


def no_token(table):
    return table.drop(columns="token"), "token"


@pytest.mark.parametrize("spoiled", [other_tokens_at_a_layer, other_words_at_a_layer, rows_twice, no_token])
def test_a_report_refuses_layers_that_would_lie_over_one_another(run, spoiled):
    table, words = spoiled(run.table)
    with pytest.raises(bl.errors.TableError, match=words):
        bl.views.make_report(tables.with_provenance(table, run.table))


def test_a_report_refuses_neighbors_of_another_table(run, llama):
    kept, table = run.neighbors, run.table
    for part in (table[table.layer > 0], table[table.seq < 3]):
        with pytest.raises(bl.errors.TableError, match="expected neighbors of the table's"):
            bl.views.make_report(tables.with_provenance(part, table), neighbors=kept)
    moved = tables.with_provenance(table.assign(seq=table["seq"] + 1), table)
    with pytest.raises(bl.errors.TableError, match="own tokens"):
        bl.views.make_report(moved, neighbors=kept)
    other = bl.analyze(llama, [*TEXTS, *NASTY], [bl.analyzers.Surprisal()], progress=False)
    with pytest.raises(bl.errors.TableError, match="behind 'contraction'"):
        bl.views.make_report(other, neighbors=kept)
    short = dataclasses.replace(kept, bank=kept.bank.iloc[:5], own=False)
    with pytest.raises(bl.errors.TableError, match="bank of 5"):
        bl.views.make_report(table, neighbors=short)
    cut = dataclasses.replace(kept, after=kept.after[:, :, :2])
    with pytest.raises(bl.errors.TableError, match="after of shape"):
        bl.views.make_report(table, neighbors=cut)


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
        bl.views.layer_view(run.table, "compression").save(tmp_path / "no" / "view.html")
    with pytest.raises(bl.errors.StoreError):
        tables.save(run.table, tmp_path / "no" / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
