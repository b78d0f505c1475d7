"""A headless Chromium with no network, and a run to show in it."""

import pytest

import basin_lens as bl
from basin_lens.scoring import Request, score
from tests.conftest import TEXTS, chromium

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
    passed = bl.analyzers.Contraction(k=5)  # its neighbors pass themselves, so that they have distances behind the block
    request = Request([bl.analyzers.Compression(k=5), passed, bl.analyzers.Surprisal()], progress=False)
    run = score(llama, [*TEXTS, NASTY], request, keep_neighbors_of=passed)
    run.table.loc[(run.table.seq == len(TEXTS)) & (run.table.pos == 1), "token"] = WHOLE
    return run


def open_page(browser, path):
    browser.get_log("browser")
    browser.get(f"file://{path}")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def problems(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
