"""`study show`, `--dry-run`, and the folder that results go to by default."""

import json
import re
from pathlib import Path

import pytest

from basin_lens.cli import options as cli_options
from basin_lens.studies.framework import registry, storage
from basin_lens.studies.framework.measured_texts import SCORES
from basin_lens.studies.framework.spec import StudySpec
from tests.cli.calls import call
from tests.conftest import TEXTS

EVERY = [*registry.OF_TEXTS, *registry.APART, *registry.EXPERIMENTS, *registry.ELSEWHERE]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch, tmp_path):
    """No command here loads a model; each runs in a folder of its own."""
    monkeypatch.setattr(cli_options, "load", lambda name: pytest.fail(f"loaded {name}"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def texts(tmp_path) -> str:
    rows = [{"text": text, "doc": f"d{n}", "kind": "ab"[n % 2]} for n, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps(row | {"doc": "one"}) for row in rows), encoding="utf-8")
    return "texts.jsonl"


def listing() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def said(capsys, *words: str) -> str:
    """What a command that is to work says, in one line."""
    code, out, err = call("study", *words, capsys=capsys)
    assert code == 0, err
    return " ".join(out.split())


def refused(capsys, *words: str) -> str:
    """The one line of a command that is to be refused."""
    code, _, err = call("study", *words, capsys=capsys)
    (line,) = [line for line in err.splitlines() if line.startswith("basin-lens:")]
    assert code in (1, 2) and "Traceback" not in err
    return line


def folder_of(study: str, out: Path) -> None:
    """What an earlier run left, as little of it as will do."""
    facts = {"study": study, "title": "t", "about": [], "hypothesis": "h", "decision": "no", "verdict": ["No."], "not_tested": []}
    facts |= {"findings": [{"finding": "f"}], "red_flags": None, "tables": [], "figures": [], "provenance": {}}
    out.mkdir(parents=True)
    (out / "results.json").write_bytes(storage.KIND.record(facts, {}))


# -- show -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_show_says_what_a_study_declares(name, capsys):
    spec = registry.find_declaration(name)
    _, out, _ = call("study", "show", name, capsys=capsys)
    shown = " ".join(out.split())
    for text in (spec.title, spec.question, spec.hypothesis, *spec.tests, *spec.nulls):
        assert text in shown
    labels = [re.split(r"  | -", line)[0] for line in out.splitlines()[2:] if not line.startswith(" ")]
    assert labels == ["question", "hypothesis", "tests", "nulls", "options", "not tested", "command"]
    assert spec.tests and spec.nulls and spec.not_tested and out.endswith("--help\n")
    # What only a run knows stands in angle brackets; none of its braces are left.
    assert "{" not in shown and ("<layers>" in shown) == any("{layers}" in line for line in spec.not_tested)


def test_show_has_the_options_with_their_defaults(capsys):
    shown = said(capsys, "show", "mergeability")
    assert "--tokens-per-sequence [16]: Forced merges per sequence and layer." in shown
    assert "in Python only: shares [0.25, 0.5], n_random [3]" in shown
    assert "--second-model [none]: Another model to read the same texts." in said(capsys, "show", "robustness")
    assert "basin-lens merge test --help" in said(capsys, "show", "merging")


def test_show_refuses_an_unknown_study(capsys):
    line = refused(capsys, "show", "nonsense")
    assert "expected a study among" in line and "'merging', 'summary'" in line and "got 'nonsense'" in line


# -- dry run ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*registry.OF_TEXTS, *registry.APART])
def test_dry_run_says_what_would_be_run_and_writes_nothing(name, texts, capsys):
    before = listing()
    shown = said(capsys, name, texts, "--dry-run", "--layers", "0,2", "--k", "7", "--max-sequences", "5", "--out", "here")
    assert listing() == before
    assert "no model is loaded, nothing is written" in shown
    assert f"{len(TEXTS)} passages of {len(TEXTS)} documents, {sum(map(len, TEXTS)):,} characters" in shown
    assert "at most 5 sequences of at most 128 tokens" in shown and "layers 0,2" in shown and "k = 7, context patched" in shown
    spec = registry.find_spec(name)
    assert isinstance(spec, StudySpec)
    assert all(score in shown for score in SCORES) == spec.shared_scores
    assert all(what in shown for what in spec.apart)
    assert (", erasure, integrated_gradients" in shown) == (name == "importance")
    assert all(test in shown for test in spec.tests)
    assert f"here ({name}, new)" in shown


def test_dry_run_of_all_names_every_folder(texts, capsys):
    folder_of("layers", Path("studies/layers"))
    before = listing()
    shown = said(capsys, "all", texts, "--dry-run", "--out", "studies")
    assert listing() == before
    for name in (*registry.OF_TEXTS, "summary"):
        assert f"studies/{name} ({name}, {'replaced' if name == 'layers' else 'new'})" in shown


def test_dry_run_of_memorization_says_its_plan(texts, capsys):
    before = listing()
    shown = said(capsys, "memorization", "--dry-run", "--out", "here")
    assert listing() == before
    assert "16 texts of 64 tokens to be memorized" in shown and "here-models (memorization: models, new)" in shown
    given = said(capsys, "memorization", texts, "--preset", "full", "--dry-run")
    assert "100 texts of 64 tokens" in given and f"{len(TEXTS)} passages" in given


def test_dry_run_of_the_summary_reads_the_studies(capsys):
    folder_of("layers", Path("one"))
    before = listing()
    assert "layers f folders basin-lens-study/summary (summary, new)" in said(capsys, "summary", "one", "--dry-run")
    assert listing() == before
    assert "results.json" in refused(capsys, "summary", "nowhere", "--dry-run")
    assert "at least one study" in refused(capsys, "summary", "--dry-run")


@pytest.mark.many
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["layers", "{texts}", "--layers", "x"], "expected layers such as"),
        (["layers", "{texts}", "--context", "nonsense"], "expected a context among"),
        (["layers", "{texts}", "--unit", "nonsense"], "expected unit"),
        (["layers", "{texts}", "--bank", "nonsense"], "expected --bank reference"),
        (["layers", "{texts}", "--contrast", "IO,S"], "span:IO,S"),
        (["layers", "{texts}", "--contrast", "topic:a,b"], "expected a label of the texts or span as contrast, got 'topic'"),
        (["layers", "{texts}", "--exclude", "topic"], "got 'topic'; labels: ['kind']"),
        (["layers", "{texts}", "--exclude", "nothing"], "for SeedCompression"),
        (["layers", "{texts}", "--seed", "-1"], "expected seed of at least 0"),
        (["layers", "few.jsonl"], "expected at least 6 units (document), got 1"),
        (["layers", "{texts}", "--k", "1"], "expected k"),
        (["linguistic", "{texts}", "--tagger", "nonsense"], "expected a tagger"),
        (["mergeability", "{texts}", "--window", "0"], "window of at least 1"),
        (["memorization", "--preset", "nonsense"], "expected a preset"),
        (["memorization", "--design", "author"], "expected the author's works"),
        (["layers", "nowhere.txt"], "does not exist"),
        (["layers", "{texts}", "--dataset", "built-in"], "got both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_dry_run_refuses_what_the_run_would(words, expected, texts, capsys):
    before = listing()
    assert expected in refused(capsys, *(word.format(texts=texts) for word in words), "--dry-run")
    assert listing() == before


# -- folders ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*registry.OF_TEXTS, *registry.APART, *registry.EXPERIMENTS])
def test_every_study_has_a_folder_of_its_own_by_default(name, texts, capsys):
    assert f"basin-lens-study/{name} ({name}, new)" in said(capsys, name, texts, "--dry-run")


def test_all_writes_by_default_where_the_studies_do(texts, capsys):
    shown = said(capsys, "all", texts, "--dry-run")
    assert all(f"basin-lens-study/{name} ({name}, new)" in shown for name in (*registry.OF_TEXTS, "summary"))


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_the_default_folder_never_replaces_what_is_not_its_own(more, texts, capsys):
    """Others' files, another study's results, and files added to one's own."""
    for name in ("importance", "memorization", "all"):
        place = Path("basin-lens-study", "importance" if name == "all" else name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "thesis.tex").write_text("x")
        assert "thesis.tex" in refused(capsys, name, texts, *more)
        assert (place / "thesis.tex").read_text() == "x"
    folder_of("layers", Path("basin-lens-study/codelength"))
    assert "an earlier codelength study" in refused(capsys, "codelength", texts, *more)
    folder_of("layers", Path("basin-lens-study/layers"))
    Path("basin-lens-study/layers/notes.md").write_text("x")
    assert "notes.md" in refused(capsys, "layers", texts, *more)
    assert sorted(path.name for path in Path("basin-lens-study/layers").iterdir()) == ["notes.md", "results.json"]


def test_results_never_take_the_place_of_an_input(texts, capsys):
    place = Path("basin-lens-study/layers")
    place.mkdir(parents=True)
    Path(texts).rename(place / texts)
    for more in ([], ["--dry-run"]):
        assert "with the input" in refused(capsys, "layers", str(place / texts), *more)
        asked = ("memorization", "--paraphrases", str(place / texts), "--out", str(place))
        assert "with the input" in refused(capsys, *asked, *more)
