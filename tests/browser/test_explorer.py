"""The explorer in its offline page, in headless Chromium with no network: what a person sees and does."""

import re

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import basin_lens as bl
from basin_lens import tables
from tests.browser.conftest import NASTY, WHOLE, open_page, problems
from tests.conftest import TEXTS, chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium() is None, reason="needs chromium and chromium-driver")]


def until(browser, true):
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: true())


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def spans(browser):
    return browser.find_elements(By.CSS_SELECTOR, "basin-tokens .text span")


def colors(browser):
    return browser.execute_script("return [...document.querySelectorAll('basin-tokens .text span')].map(s => s.style.background)")


def title(browser):
    return browser.execute_script("return document.querySelector('basin-explorer section h2').textContent")


def open_explorer(browser, path, hash=""):
    browser.get("about:blank")  # the same page with another hash would not be read again
    open_page(browser, f"{path}{hash}")
    until(browser, lambda: any(colors(browser)))
    until(browser, lambda: one(browser, "basin-map canvas").get_attribute("aria-label"))


@pytest.fixture
def page(browser, run, tmp_path):
    bl.views.make_report(run.table, neighbors=run.neighbors).save(tmp_path / "report.html")
    open_explorer(browser, tmp_path / "report.html")
    yield tmp_path / "report.html"
    assert problems(browser) == []


@pytest.fixture
def narrow(browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    )
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.usefixtures("page")
def test_it_opens_with_all_tokens_at_the_most_reliable_layer(browser, run):
    assert len(spans(browser)) == (run.table.layer == 0).sum()
    assert "The ferry had stopped running" in one(browser, "basin-tokens").text
    found = tables.layer_summary(run.table)["compression_reliability"]
    assert title(browser) == f"compression at layer {int(found.idxmax())}"
    assert "Split-half reliability" in one(browser, "aside").text
    assert "What was left out" in one(browser, "main").text


def test_texts_run_nothing_wherever_they_stand(browser, run, tmp_path):
    table = run.table.copy()
    evil = WHOLE + "<img src=x onerror=window.hacked=1>"
    table["doc"] = [evil + doc for doc in table["doc"]]
    table = tables.with_provenance(table, run.table)
    bl.views.make_report(table, neighbors=run.neighbors, title=evil).save(tmp_path / "report.html")
    open_explorer(browser, tmp_path / "report.html")
    assert WHOLE + NASTY[1:] in one(browser, "basin-tokens").text
    assert one(browser, "h1").text == evil
    assert evil in one(browser, "basin-tokens h3").text
    for row in [*range(5), len(spans(browser)) - 3]:
        spans(browser)[row].click()
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "basin-explorer b, basin-explorer img")
    assert problems(browser) == []


@pytest.mark.usefixtures("page")
def test_layer_and_score_are_switched_by_mouse(browser):
    at_first = colors(browser)
    Select(one(browser, "select.layer")).select_by_visible_text("2")
    until(browser, lambda: title(browser) == "compression at layer 2")
    until(browser, lambda: colors(browser) != at_first)
    at_last = colors(browser)
    Select(one(browser, "select.score")).select_by_visible_text("surprisal")
    until(browser, lambda: title(browser) == "surprisal at layer 2")
    until(browser, lambda: colors(browser) != at_last)
    browser.find_elements(By.CSS_SELECTOR, "basin-curve .hit")[0].click()
    until(browser, lambda: title(browser) == "surprisal at layer 0")


@pytest.mark.usefixtures("page")
def test_neighbors_are_those_of_the_run(browser, run):
    row, kept = 12, run.neighbors
    Select(one(browser, "select.layer")).select_by_visible_text("2")
    until(browser, lambda: title(browser).endswith("2"))
    spans(browser)[row].click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "basin-neighbors mark")) == 5)
    marks = [mark.text.strip() for mark in browser.find_elements(By.CSS_SELECTOR, "basin-neighbors mark")]
    assert marks == [kept.bank["token"][i].strip() for i in kept.rows[2, row]]
    lines = browser.find_elements(By.CSS_SELECTOR, "basin-neighbors tr")[1:]
    before = [float(line.find_elements(By.CSS_SELECTOR, ".n")[0].text.replace("−", "-")) for line in lines]
    assert before == pytest.approx(kept.before[2, row], rel=0.05)
    near = {int(span.get_attribute("data-row")) for span in browser.find_elements(By.CSS_SELECTOR, ".near")}
    assert near == set(kept.rows[2, row].tolist())


@pytest.mark.usefixtures("page")
def test_everything_goes_by_keyboard(browser):
    spans(browser)[4].click()
    until(browser, lambda: "chosen" in spans(browser)[4].get_attribute("class"))
    browser.execute_script("arguments[0].focus()", spans(browser)[4])

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    press(Keys.ARROW_RIGHT)
    until(browser, lambda: browser.switch_to.active_element.get_attribute("data-row") == "5")
    layer = int(title(browser)[-1])
    press(Keys.ARROW_DOWN if layer else Keys.ARROW_UP)
    until(browser, lambda: int(title(browser)[-1]) == (layer - 1 if layer else 1))
    press("s")
    until(browser, lambda: not title(browser).startswith("compression at"))
    press("/")
    assert "search" in browser.switch_to.active_element.get_attribute("class")
    press("glass")
    press(Keys.ENTER)
    until(
        browser, lambda: (found := browser.find_elements(By.CSS_SELECTOR, ".chosen")) and found[0].get_attribute("data-row") != "5"
    )
    start = int(one(browser, ".chosen").get_attribute("data-row"))
    assert "".join(span.text for span in spans(browser)[start : start + 5]).strip().startswith("glass")
    press(Keys.ESCAPE)
    until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".chosen"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "basin-tokens [tabindex='0']")) == 1


def press(browser, key):
    """A key where nothing has the focus."""
    browser.execute_script("document.activeElement.blur()")
    one(browser, "body").send_keys(key)


@pytest.mark.usefixtures("page")
def test_keys_are_heard_where_nothing_has_the_focus_and_left_to_fields(browser):
    press(browser, "s")
    until(browser, lambda: not title(browser).startswith("compression at"))
    press(browser, Keys.ARROW_RIGHT)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".chosen"))
    layer = int(title(browser)[-1])
    press(browser, Keys.ARROW_DOWN if layer else Keys.ARROW_UP)
    until(browser, lambda: int(title(browser)[-1]) == (layer - 1 if layer else 1))
    at = title(browser)
    browser.execute_script("document.body.append(Object.assign(document.createElement('input'), {id: 'other'}))")
    one(browser, "#other").send_keys("s/" + Keys.ARROW_LEFT + Keys.ESCAPE)
    one(browser, "select.layer").send_keys(Keys.ESCAPE)
    press(browser, Keys.CONTROL + "s" + Keys.NULL)
    assert one(browser, "#other").get_attribute("value") == "s/" and title(browser) == at


@pytest.mark.usefixtures("page")
def test_of_two_explorers_the_one_used_last_answers(browser):
    browser.execute_async_script(
        "const [done] = arguments, one = document.querySelector('basin-explorer'), two = document.createElement('basin-explorer');"
        "one.after(two); two.open(one.provider).then(done);"
    )

    def scores():
        return browser.execute_script("return [...document.querySelectorAll('basin-explorer')].map(e => e.state.score)")

    assert scores() == [0, 0]
    press(browser, "s")
    assert scores() == [1, 0]
    browser.execute_script(
        "const two = document.querySelectorAll('basin-explorer')[1];"
        "two.querySelector('h1').dispatchEvent(new PointerEvent('pointerdown', {bubbles: true}))"
    )
    press(browser, "s")
    assert scores() == [1, 1]
    browser.execute_script("const two = document.querySelectorAll('basin-explorer')[1]; two.remove(); document.body.append(two)")
    press(browser, "s")
    assert scores() in ([2, 1], [1, 2])  # moved within the page it hears once, not twice
    browser.execute_script("document.querySelectorAll('basin-explorer')[1].remove(); document.querySelector('h1').dispatchEvent("
                           "new PointerEvent('pointerdown', {bubbles: true}))")  # fmt: skip
    before = scores()
    press(browser, "s")
    assert scores() != before


@pytest.mark.usefixtures("page")
def test_an_address_that_is_refused_stops_nothing_and_is_not_asked_for_at_every_step(browser):
    browser.execute_script(
        "window.asked = 0; history.replaceState = () => { window.asked += 1; throw new DOMException('too many'); }"
    )
    for _ in range(6):
        press(browser, Keys.ARROW_RIGHT)
    until(browser, lambda: one(browser, ".chosen").get_attribute("data-row") == "5")
    until(browser, lambda: "position 5" in one(browser, ".pane").text)
    until(browser, lambda: browser.execute_script("return window.asked") >= 1)
    browser.execute_script(
        "window.asked = 0; const e = document.querySelector('basin-explorer'); for (let i = 0; i < 60; i++) e.go({token: i % 9})"
    )
    until(browser, lambda: browser.execute_script("return window.asked") >= 1)
    assert browser.execute_script("return window.asked") == 1


@pytest.mark.usefixtures("page")
def test_what_is_chosen_is_said(browser):
    voice, slider = one(browser, ".voice[role=status]"), one(browser, ".slider")
    assert voice.get_attribute("textContent") == ""
    assert re.fullmatch(r"layer \d: compression, mean −?[\d.]+ nats", slider.get_attribute("aria-valuetext"))
    spans(browser)[4].click()
    said = rf"“{re.escape(spans(browser)[4].text)}”, position 4, layer \d: compression −?[\d.e−]+ nats"
    until(browser, lambda: re.fullmatch(said, voice.get_attribute("textContent").replace("“ ", "“")))
    before = slider.get_attribute("aria-valuetext")
    layer = int(title(browser)[-1])
    press(browser, Keys.ARROW_DOWN if layer else Keys.ARROW_UP)
    until(browser, lambda: slider.get_attribute("aria-valuetext") != before)
    until(browser, lambda: f"layer {layer - 1 if layer else 1}: " in voice.get_attribute("textContent"))
    # Letting go by the sheet's own button, which stands there anew at every step, leaves the focus at the token.
    until(browser, lambda: f"layer {layer - 1 if layer else 1}:" in one(browser, ".pane .own").get_attribute("textContent"))
    browser.execute_script("const close = document.querySelector('.pane button'); close.focus(); close.click()")
    until(browser, lambda: "No token chosen" in voice.get_attribute("textContent"))
    until(browser, lambda: browser.switch_to.active_element.get_attribute("data-row") == "4")


@pytest.mark.usefixtures("page")
def test_csv_is_copied_without_a_clipboard_or_selected_to_copy_by_hand(browser):
    browser.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true});"
        "document.execCommand = kind => { window.copied = document.activeElement.value; return kind === 'copy'; };"
    )
    button = next(b for b in browser.find_elements(By.CSS_SELECTOR, "button") if b.text == "Copy CSV")
    browser.execute_script("arguments[0].click()", button)
    until(browser, lambda: "Copied" in one(browser, ".byhand").text)
    assert browser.execute_script("return window.copied").startswith('"doc","seq","pos"')
    browser.execute_script("document.execCommand = () => false")
    browser.execute_script("arguments[0].click()", button)
    until(browser, lambda: "Ctrl+C" in one(browser, ".byhand").text)
    field = browser.switch_to.active_element
    assert field.tag_name == "textarea"
    assert browser.execute_script("return arguments[0].selectionEnd === arguments[0].value.length", field)
    one(browser, ".byhand button").click()
    until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".byhand textarea"))


def test_the_address_holds_the_state(browser, page):
    open_explorer(browser, page, "#score=surprisal&layer=2&token=7&fixed=1")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".pane.open"))
    assert title(browser) == "surprisal at layer 2"
    assert "chosen" in spans(browser)[7].get_attribute("class")
    assert one(browser, ".fixed").is_selected()
    Select(one(browser, "select.layer")).select_by_visible_text("1")
    until(browser, lambda: "layer=1" in browser.current_url)
    open_explorer(browser, page, "#score=nope&layer=77&token=-4")
    assert title(browser).startswith("compression at layer ")


@pytest.mark.usefixtures("page")
def test_the_map_chooses_token_and_layer(browser):
    canvas = one(browser, "basin-map canvas")
    pixels = "const c = arguments[0]; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 97 === 0)"
    drawn = browser.execute_script(pixels, canvas)
    assert len(set(drawn)) > 10
    browser.execute_script(
        "const r = arguments[0].getBoundingClientRect(); arguments[0].dispatchEvent(new MouseEvent('click',"
        "{bubbles: true, clientX: r.left + 34 + 3.5 * arguments[0].parentElement.width, clientY: r.top + 2}))", canvas
    )  # fmt: skip
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".chosen"))
    assert one(browser, ".chosen").get_attribute("data-row") == "3" and title(browser).endswith("layer 2")
    until(browser, lambda: browser.execute_script(pixels, canvas) != drawn)


def test_a_column_of_several_tokens_shows_names_and_chooses_the_same_one(browser, run, tmp_path):
    size, layers = 3000, (0, 2)
    values = np.random.default_rng(5).normal(size=(2, size))
    first = (
        run.table[run.table.layer == 0].iloc[[0] * size].assign(seq=0, pos=np.arange(size), token=[f" w{i}" for i in range(size)])
    )
    first = first[[*first.columns[: first.columns.get_loc("token") + 1], "surprisal"]]
    table = pd.concat([first.assign(layer=layer, surprisal=values[i]) for i, layer in enumerate(layers)], ignore_index=True)
    bl.views.make_report(tables.with_provenance(table, run.table)).save(tmp_path / "report.html")
    open_explorer(browser, tmp_path / "report.html")
    at = (
        "const m = document.querySelector('basin-map'), r = m.canvas.getBoundingClientRect(), [row, column, kind] = arguments;"
        "const e = new MouseEvent(kind, {bubbles: true, clientX: r.left + 34 + (column + .5) * m.width, clientY: r.top + (row + .5) * m.height});"
        "m.canvas.dispatchEvent(e); return m.columns[Math.floor((e.offsetX - 34) / m.width)];"
    )
    scale = browser.execute_script("return [...document.querySelector('basin-explorer').about.scores].map(s => s.zero)")
    assert scale == [False]  # surprisal is bounded: its middle is the median
    for row, column in ((0, 7), (1, 40), (0, 200)):
        layer = 1 - row
        start, end = browser.execute_script(at, row, column, "mousemove")
        assert end - start > 1
        away = np.abs(values[layer] - np.median(values[layer]))[start:end]
        token = start + int(away.argmax())
        until(browser, lambda token=token: one(browser, ".tip").get_attribute("textContent").startswith(f" w{token} "))
        assert f"of {end - start} tokens" in one(browser, ".tip").text
        browser.execute_script(at, row, column, "click")
        until(browser, lambda token=token: f"“ w{token}”" in one(browser, ".pane").get_attribute("textContent"))
        assert title(browser).endswith(f"layer {layers[layer]}")
        assert set(browser.execute_script("return Object.keys(document.querySelector('basin-explorer').state)")) == {
            "score", "layer", "token", "fixed"
        }  # fmt: skip
    assert problems(browser) == []


@pytest.mark.usefixtures("page")
def test_one_scale_for_all_layers_where_it_is_fixed(browser):
    Select(one(browser, "select.score")).select_by_visible_text("contraction")

    def ends():
        return one(browser, ".key").text.split("Red")[0]

    one(browser, ".fixed").click()
    until(browser, lambda: "One color scale" in one(browser, "aside").text)
    Select(one(browser, "select.layer")).select_by_visible_text("0")
    until(browser, lambda: title(browser).endswith("layer 0"))
    at_first = ends()
    Select(one(browser, "select.layer")).select_by_visible_text("2")
    until(browser, lambda: title(browser).endswith("layer 2"))
    assert ends() == at_first
    one(browser, ".fixed").click()
    until(browser, lambda: ends() != at_first)


@pytest.mark.usefixtures("page")
def test_what_is_shown_goes_out_as_csv_png_and_svg(browser, run):
    """What would be saved is caught before the browser asks where to."""
    browser.execute_script(
        "window.saved = []; const make = URL.createObjectURL; URL.createObjectURL = blob => { saved.push(blob); return make(blob); };"
        "HTMLAnchorElement.prototype.click = function () {};"
    )
    for button in browser.find_elements(By.CSS_SELECTOR, "button"):
        if button.text.startswith("Save"):
            browser.execute_script("arguments[0].click()", button)
    until(browser, lambda: browser.execute_script("return saved.length") == 3)
    kinds = {blob["type"]: place for place, blob in enumerate(browser.execute_script("return saved.map(b => ({type: b.type}))"))}
    assert set(kinds) == {"text/csv", "image/svg+xml", "image/png"}

    def text(kind):
        return browser.execute_async_script("saved[arguments[0]].text().then(arguments[1])", kinds[kind])

    import io
    import xml.etree.ElementTree as ElementTree

    shown = pd.read_csv(io.StringIO(text("text/csv")), keep_default_na=False, na_values=[""])
    layer = shown["layer"].iloc[0]
    rows = run.table[run.table.layer == layer]
    np.testing.assert_allclose(shown["compression (rounded)"], rows["compression"], rtol=0.02, atol=0.01)
    assert [shown[name].tolist() for name in ("doc", "seq", "pos")] == [rows[name].tolist() for name in ("doc", "seq", "pos")]
    svg = ElementTree.fromstring(text("image/svg+xml"))
    assert svg.tag.endswith("svg") and "var(" not in text("image/svg+xml")
    assert 'class="hit"' not in text("image/svg+xml") and len(browser.find_elements(By.CSS_SELECTOR, ".curve .hit")) == 3
    size = "saved[arguments[0]].arrayBuffer().then(bytes => arguments[1](bytes.byteLength))"
    assert browser.execute_async_script(size, kinds["image/png"]) > 300


@pytest.mark.usefixtures("narrow", "page")
def test_it_fits_a_narrow_window_and_the_token_is_a_sheet_at_its_bottom(browser):
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    browser.execute_script("document.querySelectorAll('basin-tokens .text span')[5].click()")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".pane.open mark"))
    sheet = one(browser, ".pane.open")
    assert sheet.rect["x"] == 0 and sheet.rect["width"] <= 400 and sheet.value_of_css_property("position") == "fixed"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    one(browser, ".pane button").click()
    until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".pane.open"))


def test_of_50_000_tokens_only_those_near_the_window_are_elements(browser, run, tmp_path):
    """All of them are reached: by search, and by scrolling to the end."""
    few = run.table[(run.table.layer < 2) & (run.table.seq < len(TEXTS))]
    size = (few.layer == 0).sum()
    few = few[[*few.columns[: few.columns.get_loc("token") + 1], "surprisal"]]
    parts = [few.assign(seq=few["seq"] + len(TEXTS) * i, doc=few["doc"] + f" {i}") for i in range(50_000 // size + 1)]
    table = pd.concat(parts, ignore_index=True)
    last = table["seq"].max()
    table.loc[(table.seq == last) & (table.pos == table.loc[table.seq == last, "pos"].max()), "token"] = "finis"
    table = tables.with_provenance(table, run.table)
    bl.views.make_report(table).save(tmp_path / "report.html")
    open_explorer(browser, tmp_path / "report.html")
    count = (table.layer == 0).sum()
    assert count >= 50_000 and re.search(f"{count:,} tokens", one(browser, "header").text)
    assert 0 < len(spans(browser)) < 3000
    browser.execute_script("scrollTo(0, document.querySelector('basin-tokens').offsetHeight / 2)")
    until(browser, lambda: any(colors(browser)) and int(spans(browser)[-1].get_attribute("data-row")) > 10_000)
    assert len(spans(browser)) < 3000
    one(browser, ".search").send_keys("finis" + Keys.ENTER)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".chosen"))
    assert int(one(browser, ".chosen").get_attribute("data-row")) == count - 1
    until(browser, lambda: len(spans(browser)) < 3000)
    # The token that the tab key reaches is there, however far the page is scrolled from it.
    browser.execute_script("scrollTo(0, 0)")
    until(browser, lambda: spans(browser)[3].get_attribute("style"))
    assert [s.get_attribute("data-row") for s in browser.find_elements(By.CSS_SELECTOR, "basin-tokens [tabindex='0']")] == [
        str(count - 1)
    ]
    assert problems(browser) == []
