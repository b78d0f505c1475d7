"""What stands in a notebook: token views where no script runs, scores under one another, and what objects say of themselves."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib import colors, image

import basin_lens as bl
from basin_lens.errors import MergeWarning, TableError
from basin_lens.views.colored_text import ColoredText, text_picture
from tests.conftest import TEXTS, make_bridge, random_tokens
from tests.views.drawn import NASTY

# -- a picture until the script has run --------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("view", ["one", "several", "rows", "layers"])
def test_a_saved_notebook_shows_a_picture_and_a_page_does_not(run, tmp_path, view):
    names = ["compression", "surprisal"]
    made = {
        "one": lambda: bl.views.token_view(run.table, names[0], 1),
        "several": lambda: bl.views.token_view(run.table, names, 1),
        "rows": lambda: bl.views.token_view(run.table, names, 1, layout="rows"),
        "layers": lambda: bl.views.layer_view(run.table, names),
    }[view]()
    html = made._repr_html_()
    (source,) = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    pixels = image.imread(io.BytesIO(base64.b64decode(source)))
    assert pixels.shape[0] > 50 and pixels.std() > 0
    # The script takes it away when it has drawn, and no other view's.
    (place,) = re.findall(r'<div id="([^"]*)-still"', html)
    assert f'id="{place}"' in html and html.rindex(f'getElementById("{place}-still")?.remove()') > html.rindex(
        "CircuitsVis.render("
    )
    made.save(tmp_path / "page.html")
    assert "data:image" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_picture_shows_what_the_view_shows(run):
    view = bl.views.token_view(run.table, "surprisal", 1, seq=0)
    rows = run.table[(run.table.layer == 1) & (run.table.seq == 0)]
    (text,) = view.still
    away = rows["surprisal"] - rows["surprisal"].median()
    np.testing.assert_allclose(text.shades, away / away.abs().max(), atol=1e-6)
    figure = text_picture(view.still)
    words = [part.get_text() for part in figure.axes[0].texts]
    assert words[0] == text.heading and "".join(words[1:]) == "".join(rows["token"])
    boxes = figure.axes[0].patches
    assert len(boxes) == np.isfinite(text.shades).sum() < len(rows)
    for box, shade in zip(boxes, text.shades[np.isfinite(text.shades)], strict=True):
        assert colors.to_hex(box.get_facecolor()) == ("#4393c3" if shade > 0 else "#d6604d")
        assert box.get_alpha() == pytest.approx(abs(shade))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_is_drawn_within_the_lines():
    tokens = [*NASTY, "$x_1$", "x" * 500, "日本", "é\u0301", "😀", "", "\\frac", *["word "] * 60]
    figure = text_picture([ColoredText("$\\bad heading", tokens, np.linspace(-1, 1, len(tokens)))])
    figure.savefig(io.BytesIO(), format="png")
    low, high = figure.axes[0].get_xlim()
    for box in figure.axes[0].patches:
        assert low <= box.get_x() and box.get_x() + box.get_width() <= high


# -- several scores under one another ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_hold_each_score_on_its_own_scale(run):
    names = ["compression", "surprisal", "raw_compression"]
    view = bl.views.token_view(run.table, names, 1, layout="rows")
    one_by_one = [bl.views.token_view(run.table, name, 1) for name in names]
    assert view.html.count("CircuitsVis.render(") == 3
    for alone in one_by_one:
        values = re.search(r'"values": (\[.*?\])', alone.html)[1]
        assert values in view.html
        assert re.search(r'class="token-caption">(.*?)<', alone.html)[1] in view.html
    assert view.title.startswith("compression, surprisal, raw_compression, layer 1")
    with pytest.raises(TableError, match="'choose' or 'rows', got 'columns'"):
        bl.views.token_view(run.table, names, 1, layout="columns")


# -- what objects say of themselves ------------------------------------------------------------------------------------------------------


def test_a_capture_says_what_it_holds_and_no_text_becomes_markup(llama):
    capture = bl.Capture.from_texts(llama, [f"<b>bold</b> {NASTY[0]}", *TEXTS], layers=[0, 2], progress=False)
    html = capture._repr_html_()
    assert "7 sequences of 7 documents" in html and f"{capture.n_rows} in all" in html and ">0, 2<" in html
    assert "&lt;b&gt;bold" in html and "<b>" not in html and "<script" not in html


def test_a_merger_says_what_it_is_and_warns_where_its_cache_grows():
    model = make_bridge("llama")
    merger = bl.merging.TokenMerger([1, 2], threshold=0.2, recent=2)
    assert repr(merger) == "TokenMerger(layers 1, 2, threshold 0.2, recent 2; no model yet; not calibrated)"
    with merger.attached(model):
        model(random_tokens(1, 40) % 3)
    told = merger.statistics()
    said = f"{told.merged.sum()} of 80 tokens merged, {told.bytes.sum():,} bytes of cache for {told.full_bytes.sum():,} without merging"
    assert told.bytes.sum() < told.full_bytes.sum()
    assert said in repr(merger) and said in merger._repr_html_()
    few = bl.merging.TokenMerger([1], threshold=1.0)
    with pytest.warns(MergeWarning, match=r"takes [\d,]+ bytes of cache in its layers for [\d,]+ without"), few.attached(model):
        model(random_tokens(1, 12))


def test_compared_policies_show_their_mean_losses(llama):
    windows = bl.merging.windows_of(llama, [text * 8 for text in TEXTS], 32, most=4)
    setting = bl.merging.Setting((1, 2), budgets=(0.9,), seeds=1, policies=("stride", "random"))
    found = bl.merging.compare_policies(llama, *windows.apart(0.5), setting, progress=False)
    html = found._repr_html_()
    for policy in ("stride", "random"):
        mean = found.windows[found.windows.policy == policy]["excess"].mean()
        assert f"{policy} at 0.9 of the cache" in html and f"{mean:+.4f} nats/token" in html
    assert repr(found).startswith("Compared(policies: stride, random, budgets: 0.9, windows: 2 of 2 documents")
