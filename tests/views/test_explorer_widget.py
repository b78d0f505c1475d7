"""The explorer in a notebook, from the kernel's side: what a front end asks, what is chosen on either side, what stands without."""

import base64
import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest

import basin_lens as bl
from basin_lens import tables
from basin_lens.errors import TableError
from basin_lens.views.pages.report import explorer_data
from tests.views.drawn import NASTY
from tests.views.test_views import numbers


@pytest.fixture
def widget(run, monkeypatch):
    """A widget whose messages to its front end are kept in `sent`: (method or custom content, buffers)."""
    import comm.base_comm
    import ipywidgets

    sent = []

    class KeptComm(comm.base_comm.BaseComm):
        def publish_msg(self, _, data=None, __=None, buffers=None, **___):
            sent.append((data or {}, [bytes(part) for part in buffers or ()]))

    monkeypatch.setattr("comm.create_comm", KeptComm)
    made = bl.views.explore(run.table, neighbors=run.neighbors)
    assert isinstance(made, ipywidgets.DOMWidget)
    sent.clear()
    made.sent = sent
    yield made
    made.close()


def receive(widget, **data):
    widget._handle_msg({"content": {"data": data}, "buffers": []})


def ask(widget, **content):
    receive(widget, method="custom", content={"id": "me 0", **content})
    data, buffers = widget.sent.pop()
    assert data["method"] == "custom" and data["content"]["id"] == "me 0"
    return data["content"], buffers


def read(facts, data):
    return numbers({**facts, "data": base64.b64encode(data).decode()})


def test_a_layer_asked_for_comes_as_bytes_with_the_tables_numbers(widget, run):
    about = ask(widget, ask="describe")[0]["facts"]
    assert about["arrays"] is None and "rows" not in about["neighbors"]
    tokens = [about["strings"][code] for code in about["rows"]]
    for place, score in enumerate(about["scores"]):
        for at, layer in enumerate(about["layers"]):
            answer, buffers = ask(widget, ask="values", place=about["values"][place][at])
            rows = run.table[run.table.layer == layer].sort_values(["seq", "pos"])
            assert rows["token"].tolist() == tokens
            expected = rows[score["name"]].to_numpy(float)
            (facts,), (data,) = answer["facts"], buffers
            found = read(facts, data)
            assert (np.isnan(found) == np.isnan(expected)).all()
            spread = max(facts["spread"], 1e-12)
            close = np.abs(found - expected) <= 0.02 * (spread + np.abs(expected - facts["middle"]))
            assert (close | np.isnan(expected)).all(), score


def test_neighbors_asked_for_are_those_of_the_page(widget, run):
    kept = explorer_data(run.table, run.neighbors, "t")["neighbors"]
    answer, buffers = ask(widget, ask="neighbors", place=1)
    for name, facts, data in zip(("rows", "before", "after"), answer["facts"], buffers, strict=True):
        np.testing.assert_array_equal(read(facts, data), numbers(kept[name][1]))


@pytest.mark.parametrize(
    "content",
    [{"ask": "values", "place": 10**6}, {"ask": "values", "place": "0"}, {"ask": "values"}, {"ask": "neighbors", "place": -1}, {}],
)
def test_what_cannot_be_answered_is_refused_in_words(widget, content):
    answer, buffers = ask(widget, **content)
    assert answer["refused"].startswith("expected") and not buffers


def test_what_is_chosen_goes_both_ways(widget, run):
    found = tables.layer_summary(run.table)["compression_reliability"]
    assert (widget.score, widget.layer, widget.token) == ("compression", int(found.idxmax()), None)
    heard = []
    widget.observe(lambda change: heard.append((change["name"], change["new"])), ["token", "layer", "score"])
    receive(widget, method="update", state={"token": [1, 2], "layer": 1 - widget.layer, "score": "surprisal"}, buffer_paths=[])
    assert ("token", (1, 2)) in heard and ("score", "surprisal") in heard
    widget.sent.clear()
    widget.token, widget.layer, widget.score = (np.int64(0), np.int64(1)), np.int64(0), "contraction"
    states = [data["state"] for data, _ in widget.sent if data.get("method") == "update"]
    assert {"token": (0, 1)} in states and {"score": "contraction"} in states
    widget.token = None
    assert widget.token is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("token", (0, 10**6)), ("token", 3), ("token", (0, 1.5)), ("layer", 99), ("layer", True), ("score", "nonsense")],
)
def test_what_is_not_shown_cannot_be_chosen(widget, name, value):
    before = getattr(widget, name)
    with pytest.raises(TableError, match="expected"):
        setattr(widget, name, value)
    assert getattr(widget, name) == before


def test_a_picture_stands_where_no_front_end_is(widget):
    data, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == repr(widget) and len(repr(widget)) < 200
    assert "data:image/png;base64," in data["text/html"] and "Run the cell" in data["text/html"]


def test_without_anywidget_it_is_a_picture_that_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    evil = NASTY[0]
    for name, value in (("token", (0, 10**6)), ("layer", 99), ("score", "nonsense")):
        with pytest.raises(TableError, match="expected"):
            setattr(bl.views.explore(run.table), name, value)
    static = bl.views.explore(run.table, title=evil)
    static.score, static.layer, static.token = "surprisal", 0, (1, 2)
    html = static._repr_html_()
    assert "pip install &#39;basin-lens[widget]&#39;" in html and "pip install" in repr(static)
    assert "surprisal at layer 0, sequence 1" in html
    assert evil not in html and not re.search(r"<script|<b>|https?:", html)


def test_the_views_are_imported_without_anywidget():
    code = "import sys, basin_lens.views; print([m for m in ('anywidget', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
