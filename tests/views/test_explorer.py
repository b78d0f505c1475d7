"""The explorer's script: its own tests, which Node runs, and the page that holds it as one text."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import basin_lens as bl
from basin_lens.views.pages import page as pages
from tests.views.test_views import data_of, numbers

NODE = shutil.which("node")
HERE = Path(__file__).parent
MODULES = Path(bl.__file__).parent / "views" / "pages" / "explorer"
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node 20")


@needs_node
def test_node_runs_the_tests_of_the_modules():
    files = sorted((HERE / "explorer").glob("*.test.mjs"))
    done = subprocess.run([NODE, "--test", "--test-reporter=tap", *files], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^# pass (\d+)", done.stdout, re.M)[1]) >= 20


@needs_node
def test_the_page_decodes_what_python_packed(run, tmp_path):
    data = data_of(bl.views.make_report(run.table, neighbors=run.neighbors).html)
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "read.mjs").write_text(
        'import {readFileSync} from "node:fs";\n'
        f"import {{PageProvider}} from {json.dumps((MODULES / 'provider.mjs').as_uri())};\n"
        'const page = new PageProvider(JSON.parse(readFileSync(process.argv[2], "utf8"))), {rows, before, after} = await page.neighbors(1);\n'
        "console.log(JSON.stringify([await page.values(0, 1), rows, before, after].map(a => Array.from(a, v => Number.isNaN(v) ? null : v))));"
    )
    done = subprocess.run([NODE, tmp_path / "read.mjs", tmp_path / "data.json"], capture_output=True, text=True, check=True)
    kept = data["neighbors"]
    packed = [data["arrays"][data["values"][0][1]], kept["rows"][1], kept["before"][1], kept["after"][1]]
    for read, expected in zip(json.loads(done.stdout), packed, strict=True):
        np.testing.assert_allclose(np.array(read, float), numbers(expected), rtol=1e-6)


@needs_node
def test_the_modules_are_one_script_in_a_page(tmp_path):
    """No name twice, no import of a file that a page does not have; every module there, and after those that it needs."""
    code = pages.explorer_script()
    (tmp_path / "one.mjs").write_text(code)
    subprocess.run([NODE, "--check", tmp_path / "one.mjs"], check=True)
    assert not re.search(r"^(import|export)\b", code, re.M)
    widget = pages.widget_script()
    (tmp_path / "widget.mjs").write_text(widget)
    subprocess.run([NODE, "--check", tmp_path / "widget.mjs"], check=True)
    assert re.findall(r"^(?:import|export)\b.{11}", widget, re.M) == ["export default {r"]
    assert {path.stem for path in MODULES.glob("*.mjs")} == set(pages.WIDGET_MODULES)
    for place, name in enumerate(pages.WIDGET_MODULES):
        needed = set(re.findall(r'^import .*"\./(\w+)\.mjs";$', (MODULES / f"{name}.mjs").read_text(encoding="utf-8"), re.M))
        assert needed <= set(pages.WIDGET_MODULES[:place]), name


def test_no_module_makes_markup_of_text_or_asks_outside():
    for path in MODULES.glob("*.mjs"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", text), path
        assert max(map(len, text.splitlines())) <= 132, path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\bfetch\b|XMLHttpRequest|WebSocket|import\(", text), path


def test_no_script_runs_in_the_page_but_its_own(run):
    html = bl.views.make_report(run.table).html
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    (code,) = re.findall(r'<script type="module">(.*?)</script>', html, re.S)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" == policy
    assert not re.search(r"<[^>]*\son\w+\s*=", html.split('<script type="application/json"')[0])


def test_the_script_uses_nothing_newer_than_the_browsers_that_the_docs_name():
    """Chromium 92, Firefox 113, Safari 16.4. What came later, by name; `node` reads any of it, and the tests' Chromium is of today."""
    newer = (
        r"structuredClone|\.findLast|\.toSorted|\.toReversed|\.toSpliced|\.with\(|Object\.(hasOwn|groupBy)|Map\.groupBy|withResolvers|"
        r"fromAsync|requestIdleCallback|adoptedStyleSheets|showPopover|startViewTransition|AbortSignal\.(timeout|any)|"
        r"\.(isWellFormed|transferToImageBitmap|union|intersection)\(|^ *static \{|checkVisibility|randomUUID|\bsetHTML|/v[a-z]*[;,)]"
    )
    for path in MODULES.glob("*.mjs"):
        assert not re.search(newer, path.read_text(encoding="utf-8"), re.M), path
    style = (MODULES / "explorer.css").read_text(encoding="utf-8")
    assert not re.search(r":has\(|@layer|@container|color-mix|light-dark|\d[dsl]v[hw]\b|oklch|&|text-wrap|subgrid", style)
    words = " ".join((Path(bl.__file__).parents[1] / "docs" / "explorer.md").read_text(encoding="utf-8").split())
    assert "Chromium 92, Firefox 113 or Safari 16.4" in words
    assert "Chromium 92, Firefox 113 or Safari 16.4" in pages.explorer_page("t", {}).html
