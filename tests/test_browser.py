"""Pages opened in headless Chromium, with no network."""

import pytest

import basin_lens as bl
from basin_lens.analysis import score
from tests.conftest import TEXTS, chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium() is None, reason="needs chromium and chromium-driver")]

NASTY = "</script><b>boo</b> and more text"
WHOLE = "</script><script>window.hacked=1</script><b>boo"  # as one token, as a vocabulary may hold it


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = chromium()
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--window-size=1400,1200", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    )  # fmt: skip
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run(llama):
    headline = bl.analyzers.Compression(k=5)
    run = score(llama, [*TEXTS, NASTY], [headline, bl.analyzers.Surprisal()], keep_neighbors_of=headline, progress=False)
    run.table.loc[(run.table.seq == len(TEXTS)) & (run.table.pos == 1), "token"] = WHOLE
    return run


def open_page(browser, path):
    browser.get_log("browser")
    browser.get(f"file://{path}")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def problems(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_report_shows_tokens_and_switches_layer_score_and_neighbors(browser, run, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    bl.views.make_report(run.table, neighbors=run.neighbors).save(tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    spans = browser.find_elements(By.CSS_SELECTOR, "#texts .text span")
    assert len(spans) == (run.table.layer == 0).sum()
    assert "The ferry had stopped running" in browser.find_element(By.ID, "texts").text
    assert WHOLE + NASTY[1:] in browser.find_element(By.ID, "texts").text
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "#texts b")

    def colors():
        return browser.execute_script("return [...document.querySelectorAll('#texts .text span')].map(s => s.style.background)")

    at_first = colors()
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("2")
    at_last = colors()
    assert at_first != at_last
    assert "at layer 2" in browser.find_element(By.ID, "viewtitle").text
    Select(browser.find_element(By.ID, "score")).select_by_visible_text("surprisal")
    assert colors() != at_last
    assert browser.find_element(By.ID, "viewtitle").text == "surprisal at layer 2"
    assert browser.find_elements(By.CSS_SELECTOR, "#curve svg circle")

    row = 12
    spans[row].click()
    lines = browser.find_elements(By.CSS_SELECTOR, "#pane table tr")[1:]
    assert len(lines) == 5
    shown = [line.find_element(By.TAG_NAME, "b").text.strip() for line in lines]
    kept = run.neighbors
    assert shown == [kept.bank["token"][i].strip() for i in kept.rows[2, row]]
    assert problems(browser) == []


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
