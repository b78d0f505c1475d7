"""The codec's benchmark, page and drawings."""

import itertools
import re
import sys

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl
from basin_lens import codec
from basin_lens.errors import (
    CodecError,
)
from basin_lens.views.codec_figures import growth_lines, rank_bars, rank_shares
from tests.codec.coded import METHODS, TEXT, weaken_xz


@pytest.mark.slow(everywhere=True)
def test_bench_agrees_with_files_and_names_what_is_missing(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", None)
    monkeypatch.setattr(codec.TextCodec, "streams_for", lambda *_: 8)  # a text as short as this has one, and a step for each token
    weaken_xz(monkeypatch)
    table = codec.bench(llama, TEXT, streams=2, context=50).set_index("coder")
    assert table.columns.tolist() == list(codec.benchmark.COLUMNS[1:])
    for method, backend in METHODS:
        coder = codec.TextCodec(llama, method, backend, streams=2, context=50)
        file = coder.encode_text(*coder.prepared(TEXT))
        row = table.loc["direct" if method == "direct" else f"ranks, {backend}"]
        assert (row.bytes, row.header_bytes) == (len(file), len(codec.read(file).header()))
    assert abs(table.gap_to_ideal["direct"]) < 0.03
    assert "pip install" in table.note["brotli -11"] and np.isnan(table.bytes["brotli -11"])
    assert table.bytes["zstd -19"] < len(TEXT) and table.bytes["PPMd -o16"] < len(TEXT)
    with pytest.raises(CodecError, match="not UTF-8"):
        codec.bench(llama, b"\xff")
    assert len(bl.views.size_bars(table.reset_index()).axes[0].patches) == table.bytes.notna().sum()


def test_the_page_shows_what_has_no_shape():
    row = {"rank": 0, "probability": 0.5, "bits": 1.0, "top": ["\u202e<b>"], "top_probability": [0.5]}
    tokens = ("\u202e", "\u00a0\u200b", " \t\x07\x7f", "\u00e9")
    made = bl.views.code_page(pd.DataFrame([row | {"token": token} for token in tokens])).html
    for shown in (r"\u202e", r"\xa0</i><i>\u200b", "\u00b7</i><wbr><i>\u21e5\t</i><i>\u2407</i><i>\\x7f"):
        assert f"<i>{shown}</i></span>" in made
    assert ">\u00e9</span>" in made
    assert not {"\u202e", "\u00a0", "\u200b", "\x07", "\x7f"} & set(made) and "<b>" not in made


def test_drawings_keep_their_words_apart_and_name_their_units():
    row = {"token": "a", "probability": 0.5, "bits": 1.0, "top": ["a"], "top_probability": [0.5]}
    table = pd.DataFrame([row | {"rank": rank} for rank in (0, 1, 700, 40_000)])
    growth = pd.DataFrame({"original": [0, 900], "model": [0.0, 300.0], "gzip": [0, 302], "xz": [0, 302]})
    lines, bars = growth_lines(growth), rank_bars(table["rank"].to_numpy())
    for figure in (lines, bars):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        words = [text for text in (*axes.texts, *axes.get_xticklabels(), axes.xaxis.label) if text.get_text()]
        boxes = [word.get_window_extent() for word in words]
        assert not [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        assert all(0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1 for box in boxes)
    assert [text.get_text() for text in lines.axes[0].texts] == ["model 300", "gzip 302", "xz 302"]
    assert (lines.axes[0].get_xlabel(), lines.axes[0].get_ylabel()) == ("bytes of text", "bytes compressed")
    assert (bars.axes[0].get_xlabel(), bars.axes[0].get_ylabel()) == ("rank", "share of tokens")
    names = [label.get_text() for label in bars.axes[0].get_xticklabels()]
    assert names[:3] == ["0", "1", "2+"] and names[10:12] == ["512+", "2\u00b9\u2070+"] and names[-1] == "2\u00b9\u2075+"
    # What the pictures show can be heard, too.
    first, second = re.findall(r' alt="([^"]*)"', bl.views.code_page(table, growth=growth).html)
    assert first.endswith("Bytes compressed of 900 bytes of text: model 300, gzip 302, xz 302")
    assert "Share of tokens by rank: 0: 25.0%, 1: 25.0%, 2+: 0.0%" in second


def test_shares_of_ranks_are_those_of_their_ranges():
    ranks = np.array([0, 0, 1, 2, 3, 4, 7, 8])
    names, shares, expected = rank_shares(ranks, np.full(100, 0.01))
    assert names == ["0", "1", "2+", "4+", "8+"]
    np.testing.assert_allclose(shares, [2 / 8, 1 / 8, 2 / 8, 2 / 8, 1 / 8])
    np.testing.assert_allclose(expected, [0.01, 0.01, 0.02, 0.04, 0.08])
    assert rank_shares(ranks) == (names, shares, [])
