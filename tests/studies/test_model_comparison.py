"""Two models on the same texts: nothing between a model and itself, what is there between two, and refusals before any pass."""

import os
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import basin_lens as bl
from basin_lens import stats, tables
from basin_lens.errors import BasinLensError, StudyError
from basin_lens.studies import model_comparison
from basin_lens.studies.framework import registry
from basin_lens.studies.framework.declared_tests import declared_test, settle
from basin_lens.studies.framework.sign_flags import SIGN
from basin_lens.studies.model_comparison import WINDOWS, _Compared
from tests.analyzers.passes import counting
from tests.cli.calls import call
from tests.conftest import make_bridge, make_tokenizer
from tests.simulation.battery import limit
from tests.studies.planted import made_text

DRAWS = int(os.environ.get("BASIN_LENS_DRAWS", "200"))  # 400 take a minute more
TEXTS = [made_text(24, seed, f"doc-{seed}") for seed in range(8)]
FEW = {"layers": [1, 2], "k": 4, "max_length": 32, "compression_tokens": None, "progress": False}


@pytest.fixture(scope="module")
def other(tokenizer):
    return make_bridge("llama", seed=5, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def study(llama, other):
    return bl.studies.compare_models(llama, other, TEXTS, names=("one", "<b>other</b>"), **FEW)


@pytest.mark.slow
def test_a_model_beside_itself_does_not_change(llama):
    """Frozen or own, the same tokens have the same score."""
    for frozen in (False, True):
        study = bl.studies.compare_models(llama, llama, TEXTS, frozen_neighbors=frozen, **FEW)
        assert np.nanmax(np.abs(study.tokens["difference"])) < 1e-5
        assert study.decision in ("no", "undecided") and not study.findings["holds"].any()


def test_the_change_is_that_of_compare_and_its_test(llama, other, study):
    sides = [(model, bl.Capture.from_texts(model, TEXTS, layers=[1, 2], max_length=32, progress=False)) for model in (llama, other)]
    pairs = bl.compare(*sides, on=bl.analyzers.Compression(k=4, nulls=False), progress=False)
    expected = stats.before_after(pairs, "difference")
    assert study.tables["change"]["estimate"].to_numpy() == pytest.approx(expected["estimate"].to_numpy(), abs=1e-6)
    assert study.findings["finding"][0] == "compression changes from one to <b>other</b>"
    assert list(study.figures) == ["both-by-layer", "difference-by-layer"]


def test_its_page_and_its_card_show_names_as_text(study):
    assert "&lt;b&gt;other&lt;/b&gt;" in study._repr_html_() and "<b>other</b>" not in study.report().html


@pytest.mark.slow
def test_frozen_neighbors_are_said(llama, other):
    study = bl.studies.compare_models(llama, other, TEXTS, frozen_neighbors=True, **FEW)
    assert any("those of the first model" in line for line in study.about)
    assert any("Where neighborhoods move" in line for line in study.not_tested)


def test_models_that_do_not_pair_are_refused(llama, trained):
    with pytest.raises(StudyError, match="same number of layers"):
        bl.studies.compare_models(llama, make_bridge("llama", tokenizer=make_tokenizer(), num_hidden_layers=2), TEXTS, **FEW)
    with pytest.raises(StudyError, match=r"same tokens|same number of layers"):
        bl.studies.compare_models(llama, trained, TEXTS, **FEW)


BOOK = made_text(220, 3, "book")


@pytest.mark.slow
def test_windows_of_one_text_are_units_under_a_red_flag(llama, other):
    study = bl.studies.compare_models(llama, other, BOOK.text, names=("one", "other"), **FEW)
    (row,) = study.flags[study.flags["flag"] == WINDOWS].to_dict("records")
    windows = study.tokens["seq"].nunique()
    assert (
        row["raised"]
        and row["question"] == "change"
        and f"{windows} windows of 1 text are the units: what is found is of this text" in row["why"]
    )
    assert study.findings["n_units"].item() > 1 and study.findings["unit"].item() == "sequence"
    assert any(f"over {windows} windows of 1 text, which are not independent" in line for line in study.about)
    assert any(line.startswith("Other texts") for line in study.not_tested)
    assert study.decision not in ("yes", "in part")
    few = bl.studies.compare_models(llama, other, [BOOK, *TEXTS[:3]], **FEW)
    assert "of 4 texts" in few.flags[few.flags["flag"] == WINDOWS]["why"].item()


@pytest.mark.slow
def test_sequences_that_were_asked_for_are_windows_too(llama, other):
    """The same numbers as by default, and so the same red flag, whoever chose the unit."""
    study = bl.studies.compare_models(llama, other, BOOK.text, unit="sequence", **FEW)
    assert WINDOWS in set(study.flags["flag"]) and study.decision not in ("yes", "in part")
    assert any(line.startswith("Other texts") for line in study.not_tested)
    apart = bl.studies.compare_models(llama, other, TEXTS, unit="sequence", **FEW | {"max_length": 128})
    many = apart.tokens["seq"].nunique() > apart.tokens["doc"].nunique()
    assert (WINDOWS in set(apart.flags["flag"])) == many


def words_on(figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))


@pytest.mark.many
@pytest.mark.parametrize(
    ("texts", "unit", "over", "band"),
    [
        (TEXTS, "document", "8 documents", "over documents"),
        (BOOK.text, "document", r"\d+ windows of 1 text", "over sequences"),
        (TEXTS, "topic", "7 values of 'topic'", "over values of 'topic'"),
    ],
    ids=["documents", "windows", "label"],
)
def test_captions_and_figures_say_what_the_test_was_over(llama, other, texts, unit, over, band):
    if unit == "topic":
        texts = [bl.Passage(text.text, doc=text.doc, labels={"topic": f"k{at % 7}"}) for at, text in enumerate(texts)]
    study = bl.studies.compare_models(llama, other, texts, unit=unit, **FEW)
    assert re.search(f"Tests and intervals are over {over}[.,]", " ".join(study.about))
    both, difference, _ = study.sections
    of_windows = band.replace("sequences", "windows")
    assert difference.caption == f"Mean difference with 95 % intervals {of_windows}."
    assert both.caption.startswith("Mean over documents") and (" with 95 % intervals" in both.caption) == (texts is not BOOK.text)
    said = words_on(study.figures["difference-by-layer"])
    assert band in said and ("over documents" in said) == (unit == "document" and texts is not BOOK.text)
    assert not re.search(
        r"\b1 (texts|documents|windows|sequences)\b", " ".join([*study.about, *study.verdict, said, *study.not_tested])
    )


def test_many_texts_are_their_own_units(study):
    assert WINDOWS not in set(study.flags["flag"]) and study.findings["unit"].item() == "document"


@pytest.mark.slow
def test_units_are_a_label_where_one_is_named(llama, other):
    labelled = [bl.Passage(text.text, doc=text.doc, labels={"topic": f"k{at % 7}"}) for at, text in enumerate(TEXTS)]
    study = bl.studies.compare_models(llama, other, labelled, unit="topic", **FEW)
    assert study.findings["n_units"].item() == 7 and set(study.tokens["topic"]) == {f"k{at}" for at in range(7)}


@pytest.mark.parametrize(
    ("texts", "changed", "said"),
    [
        (
            " ".join(BOOK.text.split()[:90]),
            {"max_length": 64},
            r"as many windows of one text.*got 1 document with \d windows? of.*shorter windows \(max_length=",
        ),
        (" ".join(BOOK.text.split()[:20]), {}, r"Add texts\.$"),
        (BOOK.text, {"k": 5000}, "5000"),
        (TEXTS, {"compression_tokens": 3}, "queries of at least 4"),
        ([bl.Passage(text.text, labels={"topic": 1}) for text in TEXTS], {"unit": "topic"}, r"6 units \(topic\), got 1"),
        (TEXTS, {"layers": [9]}, "layer"),
        (
            [bl.Passage(t.text, labels={"difference": i}) for i, t in enumerate(TEXTS)],
            {"unit": "difference"},
            "a column of the pairs",
        ),
        (
            [bl.Passage(t.text, labels={"compression_a": i}) for i, t in enumerate(TEXTS)],
            {"unit": "compression_a"},
            "Rename the label",
        ),
        ([bl.Passage(text.text, labels={"compression": 1}) for text in TEXTS], {}, "compression"),
    ],
)
def test_what_the_texts_cannot_give_is_refused_before_a_model_runs(llama, other, monkeypatch, texts, changed, said):
    with counting(monkeypatch) as (forward, _), pytest.raises(BasinLensError, match=said):
        bl.studies.compare_models(llama, other, texts, **FEW | changed)
    assert forward == []


@pytest.mark.slow
def test_a_sign_that_changes_over_layers_is_flagged(llama, other, monkeypatch):
    """Planted: the second model is above the first at one layer and below it at the other."""
    real = model_comparison.compare

    def planted(*sides, **options):
        pairs = real(*sides, **options)
        size = np.where(pairs["layer"] == 1, 1.0, turned)
        return tables.assign(pairs, difference=pairs["difference"] * 0.01 + size)

    monkeypatch.setattr(model_comparison, "compare", planted)
    for turned in (-1.0, 1.0):
        study = bl.studies.compare_models(llama, other, TEXTS, **FEW)
        assert study.findings["holds"].all()
        (row,) = study.flags[study.flags["flag"] == SIGN].to_dict("records")
        assert row["raised"] == (turned < 0) and row["question"] == "change"


@pytest.fixture
def fewer_flips(monkeypatch):
    """A tenth of the sign flips in a test, whose level does not depend on their number."""
    monkeypatch.setattr(model_comparison.stats, "before_after", partial(stats.before_after, n_resamples=999))


def rate_of(held: _Compared, draw, name: str, draws: int = DRAWS) -> float:
    """Share of draws of the difference in which the declared test holds, from the choice of a layer to the family."""
    found = 0
    for _ in range(draws):
        pairs = held.pairs.assign(difference=draw())
        drawn = replace(held, pairs=pairs)
        row = declared_test(pairs, partial(model_comparison._change, held=drawn), drawn, "changes", "change", "difference")
        found += bool(settle("compare", [row])["holds"].any())
    error = np.sqrt(found / draws * (1 - found / draws) / draws)
    print(f"{name}: {found / draws:.3f} +- {error:.3f} ({found} of {draws} draws)")
    return found / draws


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_flips")
@pytest.mark.parametrize("units", [8, 24])
def test_false_positives_where_nothing_changes_in_one_direction(llama, units):
    """The model and itself with noise on its weights; which of the two comes first is drawn for every text."""
    texts = [made_text(24, seed, f"doc-{seed}") for seed in range(units)]
    noisy = make_bridge("llama", tokenizer=llama.tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in noisy.parameters():
            one += 0.002 * one.std(correction=0) * torch.randn(one.shape, generator=generator)
    study = bl.studies.compare_models(llama, noisy, texts, **FEW)
    plain = pd.DataFrame(study.tokens.to_dict("series"))  # its provenance would be copied at every step
    held = _Compared(plain, bl.Capture.plan(llama, texts, max_length=32), ("one", "noisy"), "document", 0)
    seq, values, rng = plain["seq"].to_numpy(), plain["difference"].to_numpy(), np.random.default_rng(0)
    assert np.nanstd(values) > 0
    rate = rate_of(held, lambda: rng.choice([-1.0, 1.0], seq.max() + 1)[seq] * values, f"{units} texts, swapped models")
    assert rate <= limit(DRAWS)


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_flips")
def test_false_positives_of_windows_are_why_they_are_flagged(llama):
    """Windows that are drawn apart hold the rate; windows whose changes go on from one to the next (correlation 0.5) do not."""
    texts = [made_text(24, seed, f"doc-{seed}") for seed in range(24)]
    capture = bl.Capture.plan(llama, texts, max_length=64)
    keys = pd.MultiIndex.from_product([range(1, 4), range(24)], names=["layer", "seq"]).to_frame(index=False)
    pairs = keys.assign(doc="book", pos=1, difference=0.0)
    held, rng = _Compared(pairs, capture, ("one", "other"), "sequence", 0, windows=True), np.random.default_rng(1)

    def drawn(correlation):
        steps = rng.normal(size=(24, 3))
        for at in range(1, 24):
            steps[at] = correlation * steps[at - 1] + np.sqrt(1 - correlation**2) * steps[at]
        return steps.T.ravel()

    assert rate_of(held, lambda: drawn(0.0), "windows apart") <= limit(DRAWS)
    assert rate_of(held, lambda: drawn(0.5), "windows that go on", 100) > limit(100)


def test_it_is_declared_and_its_command_refuses_before_a_model_is_loaded(monkeypatch, capsys, tmp_path):
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", lambda name: pytest.fail(f"loaded {name}"))
    monkeypatch.chdir(tmp_path)
    assert registry.find_declaration("compare").name == "compare"
    for words, said in (
        (("a", "a"), "got 'a' twice"),
        (("a", "b", "nowhere.txt"), "nowhere.txt"),
        (("a", "b", "--layers", "x"), "expected layers"),
    ):
        code, _, err = call("compare", *words, capsys=capsys)
        assert code in (1, 2) and said in err and "Traceback" not in err


def test_its_command_writes_its_folder(llama, other, monkeypatch, capsys, tmp_path):
    from basin_lens.cli import options

    monkeypatch.setattr(options, "load", {"one": llama, "two": other}.get)
    monkeypatch.chdir(tmp_path)
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text.text, encoding="utf-8")
    files = [f"{index}.txt" for index in range(len(TEXTS))]
    code, out, err = call("compare", "one", "two", *files, "--layers", "1", "--k", "4", "--out", "change", capsys=capsys)
    assert code == 0, err
    assert "compression changes from one to two" in " ".join(out.split())
    assert {"report.html", "results.json"} <= {path.name for path in (tmp_path / "change").iterdir()}
