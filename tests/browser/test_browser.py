"""Pages opened in headless Chromium, with no network."""

import pytest

import basin_lens as bl
from tests.browser.conftest import NASTY, WHOLE, open_page, problems
from tests.conftest import TEXTS, chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium() is None, reason="needs chromium and chromium-driver")]


def test_token_view_page_draws_harmless_tokens(browser, run, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    bl.views.token_view(run.table, "compression", layer=1, seq=len(TEXTS)).save(tmp_path / "view.html")
    open_page(browser, tmp_path / "view.html")
    box = WebDriverWait(browser, 20).until(lambda b: b.find_element(By.CLASS_NAME, "colored-tokens"))
    assert WHOLE + NASTY[1:].replace(" ", "") in box.text.replace("\u00a0", "").replace(" ", "").replace("\n", "")
    assert browser.execute_script("return window.hacked") is None
    assert not box.find_elements(By.TAG_NAME, "b")
    assert len(box.find_elements(By.TAG_NAME, "em")) == 1
    assert problems(browser) == []


def drawn(browser, selector=".colored-tokens"):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda b: b.find_element(By.CSS_SELECTOR, selector))


def colors(browser, selector=".colored-tokens"):
    code = "return [...document.querySelectorAll(arguments[0] + ' > span > span')].map(s => s.style.backgroundColor)"
    return browser.execute_script(code, selector)


def becomes(browser, expected):
    """CircuitsVis paints a little after the click."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10).until(lambda b: expected(colors(b)))


def letters(text):
    return "".join(text.split())


def test_token_view_of_several_scores_colors_by_the_one_chosen(browser, run, tmp_path):
    from selenium.webdriver.common.by import By

    names = ["compression", "surprisal"]
    bl.views.token_view(run.table, names, layer=1, seq=len(TEXTS)).save(tmp_path / "view.html")
    open_page(browser, tmp_path / "view.html")
    box = drawn(browser)
    assert letters(WHOLE + NASTY[1:]) in letters(box.text)
    assert browser.execute_script("return window.hacked") is None
    assert not box.find_elements(By.TAG_NAME, "b")
    rows = run.table[(run.table.layer == 1) & (run.table.seq == len(TEXTS))]
    for name in names:
        browser.find_element(By.XPATH, f"//div[text()='{name}']").click()
        values = rows[name].to_numpy()
        middle = 0 if (values < 0).any() and (values > 0).any() else rows[name].median()
        # The value furthest from the middle has the full color, whichever score was shown first.
        furthest = int((rows[name] - middle).abs().reset_index(drop=True).idxmax())
        full = "rgb(0, 0, 255)" if values[furthest] > middle else "rgb(255, 0, 0)"
        assert becomes(browser, lambda shown, at=furthest, full=full: shown[at] == full)
    assert problems(browser) == []


def test_layer_view_switches_layer_and_score(browser, run, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    bl.views.layer_view(run.table, ["compression", "surprisal"], seq=len(TEXTS)).save(tmp_path / "view.html")
    open_page(browser, tmp_path / "view.html")
    box = drawn(browser)
    assert letters(WHOLE + NASTY[1:]) in letters(box.text)
    assert letters(box.text).endswith("lowesthighest")
    layer, score = (Select(select) for select in browser.find_elements(By.TAG_NAME, "select"))
    assert [option.text for option in layer.options] == ["0", "1", "2"]
    assert [option.text for option in score.options] == ["compression [nats]", "surprisal [nats]"]
    first = colors(browser)
    assert first[-2:] == ["rgb(255, 0, 0)", "rgb(0, 0, 255)"]
    layer.select_by_visible_text("2")
    assert becomes(browser, lambda shown: shown != first)
    last = colors(browser)
    assert last[-2:] == first[-2:]
    score.select_by_visible_text("surprisal [nats]")
    assert becomes(browser, lambda shown: shown != last)
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(By.TAG_NAME, "b")
    assert problems(browser) == []


@pytest.fixture(scope="module")
def study(run):
    import pandas as pd

    evil = WHOLE + NASTY
    views = [
        bl.views.token_view(run.table, "compression", 1, seq=len(TEXTS)),
        bl.views.token_view(run.table, ["compression", "surprisal"], 1, seq=len(TEXTS)),
        bl.views.layer_view(run.table, ["compression", "surprisal"], seq=len(TEXTS)),
    ]
    figure = bl.views.layer_curve(run.table, "compression")
    table = pd.DataFrame({"layer": range(40), "what": evil, "p_corrected": 1e-9})
    flags = pd.DataFrame({"flag": ["no variance", evil], "raised": [False, True], "why": ["fine", evil]})
    return bl.views.study_page(
        evil, about=["About."], hypothesis="H.", verdict="V.", flags=flags, not_tested=["N."], provenance={"text": evil},
        sections=[
            bl.views.Section("Figure", evil, figure=figure, caption="Curve."),
            bl.views.Section("Table", table=table, note=evil),
            *(bl.views.Section(f"View {i}", view=view) for i, view in enumerate(views)),
        ],
    )  # fmt: skip


def test_study_page_shows_everything_and_runs_nothing_of_its_texts(browser, study, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    study.save(tmp_path / "study.html")
    browser.get_log("browser")
    browser.get(f"file://{tmp_path / 'study.html'}")
    WebDriverWait(browser, 20).until(lambda b: len(b.find_elements(By.CLASS_NAME, "colored-tokens")) == 3)
    resources = browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
    assert all(name.startswith("data:") for name in resources)
    assert browser.find_element(By.TAG_NAME, "h1").text == WHOLE + NASTY
    assert browser.execute_script("return window.hacked") is None
    assert not [b for b in browser.find_elements(By.TAG_NAME, "b") if b.text.startswith("boo")]
    image = browser.find_element(By.CSS_SELECTOR, "figure img")
    assert browser.execute_script("return arguments[0].naturalWidth", image) == 1050
    # The views did not clear away what follows them, and work beside one another.
    assert [h.text for h in browser.find_elements(By.TAG_NAME, "h2")][-5:] == [
        "Provenance", "Hypothesis, declared before looking", "Verdict", "Red flags", "What was not tested",
    ]  # fmt: skip
    before = colors(browser)
    Select(browser.find_elements(By.TAG_NAME, "select")[0]).select_by_visible_text("2")
    assert becomes(browser, lambda shown: shown != before)
    folded = browser.find_element(By.XPATH, "//details[contains(., 'Table of 40 rows')]")
    assert not folded.find_element(By.TAG_NAME, "table").is_displayed()
    folded.find_element(By.TAG_NAME, "summary").click()
    assert folded.find_element(By.TAG_NAME, "table").is_displayed()
    assert "< 0.0001" in folded.text
    assert browser.find_element(By.CSS_SELECTOR, ".flag.yes").text == "▲ RAISED"
    assert problems(browser) == []


def test_study_page_fits_a_narrow_screen_and_prints_what_is_folded(browser, study, tmp_path):
    study.save(tmp_path / "study.html")
    browser.get(f"file://{tmp_path / 'study.html'}")
    drawn(browser)
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    closed = "return document.querySelectorAll('details:not([open])').length"
    folded = browser.execute_script(closed)
    assert folded >= 2
    assert browser.execute_script("dispatchEvent(new Event('beforeprint'));" + closed) == 0
    assert browser.execute_script("dispatchEvent(new Event('afterprint'));" + closed) == folded


# Contrast (WCAG 2) of every word, outside of colored tokens and their key, with its ground; grounds of drawings and of the page.
CONTRASTS = """
const parts = color => color.match(/[\\d.]+/g).map(Number);
const light = color => { const [r, g, b] = parts(color).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (parts(c)[3] !== 0) return c; } return "rgb(255, 255, 255)"; };
const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) { const e = walk.currentNode.parentElement, style = getComputedStyle(e);
  if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
  if (e.closest(".token-ground, .text:not(basin-tokens .text), .key span:not(basin-explorer .key span), script, style, option")) continue;
  const pair = [light(e.closest("svg") ? style.fill : style.color), light(ground(e))].sort((a, b) => b - a);
  found.push([walk.currentNode.data.trim(), (pair[0] + .05) / (pair[1] + .05)]); }
const cards = [...document.querySelectorAll(".token-ground, .text, svg, figure img")]
  .filter(e => !e.closest("basin-explorer")).map(e => getComputedStyle(e).backgroundColor);
return [found, cards, light(getComputedStyle(document.body).backgroundColor)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["report", "tokens", "layers", "study", "code"])
def test_pages_are_dark_where_the_screen_is_and_can_be_read(browser, run, study, llama, tmp_path, kind, scheme):
    from selenium.webdriver.support.ui import WebDriverWait

    made = {
        "report": lambda: bl.views.make_report(run.table, neighbors=run.neighbors),
        "tokens": lambda: bl.views.token_view(run.table, "compression", layer=1),
        "layers": lambda: bl.views.layer_view(run.table, "compression"),
        "study": lambda: study,
        "code": lambda: bl.views.code_page(bl.codec.TextCodec(llama, context=32).ranks(TEXTS[0]), facts={"bytes": "100"}),
    }[kind]()
    made.save(tmp_path / "page.html")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        browser.get(f"file://{tmp_path / 'page.html'}")
        if kind == "report":
            WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", ".text span[style]"))
        if kind in ("tokens", "layers", "study"):
            WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", ".colored-tokens"))
        words, cards, ground = browser.execute_script(CONTRASTS)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert words and min(ratio for _, ratio in words) >= 4.5, sorted(words, key=lambda word: word[1])[:5]
    assert (ground < 0.02) == (scheme == "dark") and (ground == 1) == (scheme == "light")
    if scheme == "dark" and kind not in ("code", "report"):  # there every token has a ground and an ink of its own
        assert cards and set(cards) == {"rgb(255, 255, 255)"}
    assert browser.execute_script("return getComputedStyle(document.documentElement).colorScheme") == "light dark"
