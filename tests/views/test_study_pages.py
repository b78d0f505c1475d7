"""The page of a study: in the promised order, harmless, and its tables read well."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import basin_lens as bl


def flags_of(*raised) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "flag": [f"flag {i}" for i in range(len(raised))],
            "score": "compression",
            "layer": 3,
            "raised": raised,
            "p": 1e-9,
            "why": "so",
        }
    )
    return frame.astype({"raised": "boolean"})


def study(**changes) -> str:
    given = {
        "title": "A study", "about": ["Of tiny things."], "sections": [], "hypothesis": "There is something.", "verdict": "There is not.",
        "flags": flags_of(False), "not_tested": ["Other models."], "provenance": {"seed": 0},
    }  # fmt: skip
    given |= changes
    return bl.views.study_page(given.pop("title"), **given).html


def test_study_page_ends_in_the_order_that_was_promised():
    page = study(sections=[bl.views.Section("One"), bl.views.Section("Two", "Text.")])
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    last = ["Provenance", "Hypothesis, declared before looking", "Verdict", "Red flags", "What was not tested"]
    assert headings == ["One", "Two", *last]
    assert re.findall(r'<li><a href="#\w+">(.*?)</a></li>', page) == headings
    anchors = set(re.findall(r'href="#(\w+)"', page))
    assert anchors <= set(re.findall(r'id="(\w+)"', page))
    assert page.index("There is not.") < page.index("Of tiny things.") < page.index("<h2"), "the verdict is read first"
    assert page.count("There is not.") == 2


def test_study_page_marks_red_flags():
    page = study(flags=flags_of(True, False, None))
    assert "Red flags: 1 of 3 raised, 1 not checked" in page
    rows = re.findall(r'<tr class="(\w+)"><td><span class="flag \w+">(.*?)</span></td><td>(.*?)</td>', page)
    assert rows == [("yes", "▲ RAISED", "flag 0"), ("no", "no", "flag 1"), ("unknown", "? not checked", "flag 2")]
    assert 'class="verdict raised"' in page
    assert 'class="verdict raised"' not in study(flags=flags_of(False, None))
    assert "No red flags were computed" in study(flags=None)
    with pytest.raises(bl.errors.TableError, match="raised"):
        study(flags=flags_of(True).drop(columns="raised"))
    with pytest.raises(bl.errors.TableError, match="at least one"):
        study(flags=flags_of())


def test_study_page_never_turns_text_into_markup():
    from matplotlib.figure import Figure

    evil = '</script><b>bold</b>"><img src=x onerror=a(1)>__VERDICT__'
    table = pd.DataFrame({evil: [evil, evil], "n": [1, 2]})
    section = bl.views.Section(evil, [evil], figure=Figure((1, 1)), caption=evil, table=table, note=evil)
    page = study(
        title=evil, subtitle=evil, about=[evil], sections=[section, bl.views.Section("s", caption=evil)], hypothesis=evil,
        verdict=[evil, evil], flags=flags_of(True).assign(flag=evil, why=evil, score=evil), not_tested=[evil], provenance={evil: evil},
    )  # fmt: skip
    assert "<b>bold" not in page
    assert "<img src=x" not in page
    assert page.count("__VERDICT__") > 20, "left alone"
    assert page.count("<script") == page.count("</script>") == 1
    assert re.findall(r"<img [^>]*>", page) == re.findall(
        r'<img width="96" height="96" alt="[^"<>]*" src="data:image/png;base64,[^"]*">', page
    )
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page


def test_only_one_module_makes_markup_and_every_template_escapes():
    from basin_lens.views.pages import page

    rooms = Path(bl.__file__).parent
    templates = sorted((rooms / "views" / "pages" / "templates").iterdir())
    assert {path.suffix for path in templates} == {".html", ".css", ".js"}
    for path in templates:
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", path.read_text(encoding="utf-8")), path
    assert page._ENVIRONMENT.autoescape is True
    makers = {path.name for path in rooms.rglob("*.py") if re.search(r"\bMarkup\((?!\"<)", path.read_text(encoding="utf-8"))}
    assert makers == {"page.py"}
    assert [path.name for path in rooms.rglob("*.py") if re.search(r"\bEnvironment\(", path.read_text(encoding="utf-8"))] == [
        "page.py"
    ]
    written_by_hand = re.compile(r"</(?!script)\w+>")
    shown_with_tags = {path.name for path in rooms.rglob("*.py") if written_by_hand.search(path.read_text(encoding="utf-8"))}
    allowed = {"tokens.py", "report.py", "values.py"}
    assert shown_with_tags == allowed, "the tags that CircuitsVis takes; an example; the card of rooms below the views, escaped"


def test_code_within_a_script_cannot_end_it():
    from basin_lens.views.pages.page import within_script

    with pytest.raises(AssertionError):
        within_script("1</Script>")


def test_study_page_holds_figures_and_shares_the_script_of_its_views(run):
    import base64

    views = [bl.views.token_view(run.table, "compression", 1), bl.views.layer_view(run.table, ["compression", "surprisal"])]
    figure = bl.views.layer_curve(run.table, "compression")
    sections = [bl.views.Section("f", figure=figure, caption="By layer."), *(bl.views.Section("v", view=view) for view in views)]
    page = study(sections=sections)
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert 'alt="f. By layer."' in page
    assert "<figcaption>By layer.</figcaption>" in page
    assert page.count("var CircuitsVis=") == 1
    assert page.count("CircuitsVis.render(") == 2
    assert len(page) < len(views[0].script) + 400_000
    assert study(sections=sections[:2]) == study(sections=sections[:2]), "the same study is the same page"


def test_study_page_tables_read_well():
    long = pd.DataFrame({"layer": range(31), "p": 0.5})
    table = pd.DataFrame(
        {
            "score": ["a", "b"], "estimate": [0.123456, np.nan], "p_corrected": [1e-7, 0.04321], "n_tokens": [24000, 5], "chosen": [True, False],
            "maybe": pd.array([True, None], "boolean"), "size": ["3 nats", None],
        }
    )  # fmt: skip
    page = study(sections=[bl.views.Section("t", table=table), bl.views.Section("l", table=long)], flags=None)
    first = re.search(r'<div class="wide">(<table>.*?</table>)', page, re.S).group(1)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in first.split("<tr>")[2:]]
    assert rows == [
        ["a", "0.1235", "&lt; 0.0001", "24,000", "yes", "yes", "3 nats"],
        ["b", "–", "0.0432", "5", "no", "–", "–"],
    ]
    assert '<details><summary>Table of 31 rows and 2 columns</summary><div class="tall">' in page


def test_study_page_says_once_what_every_row_of_a_wide_table_says():
    table = pd.DataFrame({"layer": range(3), "estimate": [0.1, 0.2, 0.3], **dict.fromkeys("abcdefg", "same"), "note": ""})
    page = study(sections=[bl.views.Section("t", table=table)], flags=None)
    assert "In every row: a same; b same; c same; d same; e same; f same; g same." in page, "an empty note says nothing"
    assert re.findall(r'<th(?: class="n")?>(.*?)</th>', page) == ["layer", "estimate"]
