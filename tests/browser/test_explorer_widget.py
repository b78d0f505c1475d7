"""The explorer's widget in headless Chromium with no network: its module, as anywidget gets it, with a model that stands for the kernel."""

import base64
import json

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from basin_lens import tables
from basin_lens.views.pages.page import widget_script
from basin_lens.views.pages.report import explorer_data
from basin_lens.views.pages.shown import Shown
from tests.browser.conftest import NASTY, WHOLE, open_page, problems
from tests.conftest import chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium() is None, reason="needs chromium and chromium-driver")]

EVIL = WHOLE + "<img src=x onerror=window.hacked=1>"
# Two cells: above and below the widget something of the notebook's own, with styles that the widget must not take, or change.
PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><style>body {{ margin:8px; font:16px serif; }}
h2 {{ color:rgb(255, 0, 0); font-size:60px; }} .bar, .text {{ display:none; }}</style></head><body>
<h2 id="above">A heading of the notebook</h2><div class="soft" id="soft">soft</div><div id="one"></div><div id="two"></div>
<input id="cell"><script type="application/json" id="answers">{answers}</script><script type="module">
const answers = JSON.parse(document.getElementById("answers").textContent);
const binary = text => new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
class Model {{
  constructor(state) {{ Object.assign(this, {{state, kept: {{}}, heard: [], asked: [], saved: []}}); }}
  get(name) {{ return this.state[name]; }}
  set(name, value) {{ this.state[name] = value; this.kept[name] = value; this.tell("change:" + name); }}
  tell(kind, ...more) {{ this.heard.filter(h => h[0] === kind).forEach(h => h[1](...more)); }}
  on(kind, hear) {{ this.heard.push([kind, hear]); }}
  off(kind, hear) {{ this.heard = this.heard.filter(h => h[0] !== kind || h[1] !== hear); }}
  save_changes() {{ this.saved.push(this.kept); this.kept = {{}}; }}
  send(message) {{
    this.asked.push(`${{message.ask}} ${{message.place ?? ""}}`.trim());
    const [facts, buffers] = answers[this.asked.at(-1)];
    setTimeout(() => this.tell("msg:custom", {{id: message.id, facts}}, buffers.map(binary)));
  }}
}}
{script}
window.keys = [];
document.addEventListener("keydown", e => window.keys.push(e.key));
for (const name of ["one", "two"]) {{
  const model = window["model_" + name] = new Model({{token: null, layer: {layer}, score: "{score}"}});
  window["end_" + name] = widget.render({{model, el: document.getElementById(name)}});
}}
</script></body></html>"""


def page_of(shown):
    questions = [{"ask": "describe"}, *({"ask": "values", "place": place} for place in range(len(shown.data["arrays"])))]
    questions += [{"ask": "neighbors", "place": place} for place in range(len(shown.data["layers"]))]
    answers = {}
    for question in questions:
        content, buffers = shown.answer(question)
        key = f"{question['ask']} {question.get('place', '')}".strip()
        answers[key] = [content["facts"], [base64.b64encode(part).decode() for part in buffers]]
    score, layer = shown.first()
    held = json.dumps(answers).replace("<", "\\u003c")
    return PAGE.format(answers=held, script=widget_script().replace("export default", "const widget ="), layer=layer, score=score)


@pytest.fixture
def shown(browser, run, tmp_path):
    table = run.table.copy()
    table["doc"] = [EVIL + doc for doc in table["doc"]]
    table = tables.with_provenance(table, run.table)
    made = Shown(explorer_data(table, run.neighbors, EVIL), table)
    (tmp_path / "page.html").write_text(page_of(made), encoding="utf-8")
    open_page(browser, tmp_path / "page.html")
    for name in ("one", "two"):
        until(browser, lambda name=name: colors(browser, name))
    yield made
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert problems(browser) == []


def until(browser, true):
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: true())


def root(browser, name="one"):
    return browser.execute_script(f"return document.querySelector('#{name} > div').shadowRoot")


def one(browser, selector, name="one"):
    return root(browser, name).find_element(By.CSS_SELECTOR, selector)


def spans(browser, name="one"):
    return root(browser, name).find_elements(By.CSS_SELECTOR, "basin-tokens .text span")


def colors(browser, name="one"):
    said = f"const root = document.querySelector('#{name} > div')?.shadowRoot;"
    return browser.execute_script(
        said + "const found = [...root?.querySelectorAll('basin-tokens .text span') ?? []].map(s => s.style.background);"
        "return found.some(Boolean) && root.querySelector('canvas').getAttribute('aria-label') ? found : null"
    )


def title(browser, name="one"):
    return one(browser, "section h2", name).text


def traits(browser, name="one"):
    return browser.execute_script(f"return window.model_{name}.state")


def choose(browser, trait, value, name="one"):
    browser.execute_script(f"window.model_{name}.set(arguments[0], arguments[1])", trait, value)


def test_it_shows_the_tokens_at_the_layer_and_score_of_the_model(browser, shown):
    score, layer = shown.first()
    assert len(spans(browser)) == len(shown.keys)
    assert title(browser) == f"{score} at layer {layer}"
    assert "The ferry had stopped running" in one(browser, "basin-tokens").text
    asked = browser.execute_script("return window.model_one.asked")
    assert len(asked) == len(set(asked)) and asked[0] == "describe"
    others = {f"values {place}" for row in shown.data["values"][1:] for place in row} - {
        f"values {p}" for p in shown.data["values"][0]
    }
    assert not others & set(asked), "scores not shown yet were sent"


def test_the_mouse_changes_layer_score_and_token_of_its_own_model_alone(browser, shown):
    before, looks = traits(browser, "two"), colors(browser)
    Select(one(browser, "select.layer")).select_by_index(0)
    Select(one(browser, "select.score")).select_by_visible_text("surprisal")
    layer = shown.data["layers"][0]
    until(browser, lambda: title(browser) == f"surprisal at layer {layer}")
    until(browser, lambda: colors(browser) != looks)
    spans(browser)[3].click()
    until(browser, lambda: traits(browser)["token"] is not None)
    first = shown.data["sequences"][0]["seq"]
    assert traits(browser) == {"token": [first, shown.data["positions"][3]], "layer": layer, "score": "surprisal"}
    assert browser.execute_script("return window.model_one.saved")[-1] == {"token": [first, shown.data["positions"][3]]}
    until(browser, lambda: root(browser).find_elements(By.CSS_SELECTOR, ".pane.open basin-neighbors"))
    assert traits(browser, "two") == before


def test_keys_reach_the_explorer_that_has_the_focus_and_not_the_notebook(browser, shown):
    press = lambda *keys: browser.switch_to.active_element.send_keys(*keys)  # noqa: E731
    layers, scores = shown.data["layers"], shown.scores
    before, other = traits(browser), traits(browser, "two")
    browser.find_element(By.TAG_NAME, "body").send_keys("s", Keys.ARROW_RIGHT, Keys.ARROW_UP)
    one_cell = browser.find_element(By.ID, "cell")
    one_cell.send_keys("s/")
    assert one_cell.get_property("value") == "s/"
    assert traits(browser) == before
    spans(browser)[1].click()
    browser.execute_script("window.keys = []")
    at = layers.index(before["layer"])
    inside = one(browser, "basin-tokens span[tabindex='0']")
    inside.send_keys(Keys.ARROW_RIGHT)
    until(browser, lambda: traits(browser)["token"][1] == shown.data["positions"][2])
    one(browser, "basin-tokens span[tabindex='0']").send_keys(Keys.ARROW_DOWN if at else Keys.ARROW_UP)
    until(browser, lambda: traits(browser)["layer"] == layers[at - 1 if at else 1])
    one(browser, "basin-tokens span[tabindex='0']").send_keys("s")
    until(browser, lambda: traits(browser)["score"] == scores[1])
    one(browser, "basin-tokens span[tabindex='0']").send_keys("/")
    one(browser, ".search").send_keys("ferry", Keys.ENTER)
    until(browser, lambda: one(browser, ".search").get_attribute("aria-invalid") == "false")
    one(browser, ".search").send_keys(Keys.ESCAPE)
    until(browser, lambda: traits(browser)["token"] is None)
    assert browser.execute_script("return window.keys") == []
    assert traits(browser, "two") == other
    press(Keys.ARROW_RIGHT)  # the focus went back to the token
    until(browser, lambda: traits(browser)["token"] is not None)


def test_what_the_model_says_is_chosen_is_shown_and_the_notebook_stays_where_it_is(browser, shown):
    at = browser.execute_script("return scrollY")
    last, sequence = len(shown.data["positions"]) - 1, shown.data["sequences"][-1]["seq"]
    token = [sequence, shown.data["positions"][last]]
    choose(browser, "token", token)
    until(browser, lambda: one(browser, ".chosen").get_attribute("data-row") == str(last))
    box, span = one(browser, ".texts").rect, one(browser, ".chosen").rect
    assert box["y"] <= span["y"] + 1 and span["y"] + span["height"] <= box["y"] + box["height"] + 40
    layer = shown.data["layers"][0]
    choose(browser, "layer", layer)
    choose(browser, "score", "surprisal")
    until(browser, lambda: title(browser) == f"surprisal at layer {layer}")
    choose(browser, "token", None)
    until(browser, lambda: not root(browser).find_elements(By.CSS_SELECTOR, ".chosen"))
    assert browser.execute_script("return window.model_one.saved") == []
    assert browser.execute_script("return scrollY") == at


def test_texts_are_no_markup_and_styles_stay_on_their_side(browser, shown):
    assert WHOLE + NASTY[1:] in one(browser, "basin-tokens").text
    assert one(browser, "h1").text == EVIL and EVIL in one(browser, "basin-tokens h3").text
    assert not root(browser).find_elements(By.CSS_SELECTOR, "basin-explorer b, basin-explorer img, basin-explorer script")
    assert one(browser, ".bar").is_displayed() and one(browser, "section h2").value_of_css_property("font-size") != "60px"
    assert browser.find_element(By.ID, "above").value_of_css_property("color") == "rgba(255, 0, 0, 1)"
    assert browser.find_element(By.ID, "soft").value_of_css_property("font-size") == "16px"
    assert shown.data["title"] == EVIL


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize(
    "dark", ["document.body.dataset.jpThemeLight = 'false'", "document.body.dataset.vscodeThemeKind = 'vscode-dark'",
             "document.documentElement.setAttribute('theme', 'dark')", "document.documentElement.classList.add('dark')"],
)  # fmt: skip
def test_it_is_dark_when_the_notebook_becomes_so(browser, dark):
    light, ground = colors(browser), one(browser, "basin-explorer").value_of_css_property("background-color")
    browser.execute_script(dark)
    until(browser, lambda: one(browser, "basin-explorer").get_attribute("theme") == "dark")
    until(browser, lambda: colors(browser) != light)
    assert ground == "rgba(255, 255, 255, 1)"
    assert one(browser, "basin-explorer").value_of_css_property("background-color") == "rgba(22, 24, 27, 1)"


@pytest.mark.usefixtures("shown")
def test_it_fits_400_pixels_and_covers_nothing(browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        until(browser, lambda: "narrow" in one(browser, "basin-explorer").get_attribute("class").split())
        spans(browser)[2].click()
        until(browser, lambda: root(browser).find_elements(By.CSS_SELECTOR, ".pane.open"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert one(browser, ".pane").value_of_css_property("position") == "static"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.usefixtures("shown")
def test_a_view_that_is_taken_away_hears_nothing_more(browser):
    browser.execute_script("window.end_one()")
    assert browser.execute_script("return window.model_one.heard.length") == 0
    assert browser.execute_script("return document.getElementById('one').childElementCount") == 0
    choose(browser, "layer", 0)
    spans(browser, "two")[2].click()
    until(browser, lambda: traits(browser, "two")["token"] is not None)
