"""`basin-lens models`: what is in the cache, and nothing else, is listed and removed."""

import pytest

from basin_lens.model import kept
from tests.cli.calls import call

WEIGHTS, BANK = "smollm2-135m-" + "0a" * 8, "0b" * 16


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache"
    for folder in (place / "models" / WEIGHTS, place / "models" / "mine", place / "reference" / BANK):
        folder.mkdir(parents=True)
        (folder / "some.bin").write_bytes(b"x" * 250_000)
    (place / "models" / kept.GGUF_NAME).write_bytes(b"y" * 1_000_000)
    (place / "models" / "other.gguf").write_bytes(b"z")
    (place / "reference" / BANK / "capture.json").write_text('{"model": {"name": "a model\\u001b[31m"}}')
    return place


def test_what_is_kept_is_listed(cache, capsys):
    code, said, _ = call("models", capsys=capsys)
    assert code == 0
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "1.0 MB" in lines[kept.GGUF_NAME] and str(cache / "models" / kept.GGUF_NAME) in lines[kept.GGUF_NAME]
    assert "250.0 kB" in lines[WEIGHTS] or "0.2 MB" in lines[WEIGHTS] or "0.3 MB" in lines[WEIGHTS]
    assert "dequantized to float32" in lines[WEIGHTS] and " UTC " in lines[WEIGHTS]
    assert "reference bank of a model?[31m" in lines[BANK] and "\x1b" not in said
    assert "mine" not in lines and "other.gguf" not in lines
    assert str(cache) in said and "1.5 MB in all" in said
    assert (cache / "models" / WEIGHTS).exists()


def test_one_is_removed_by_name(cache, capsys):
    code, said, _ = call("models", "--clear", WEIGHTS, capsys=capsys)
    assert code == 0 and f"removed {WEIGHTS}" in said
    assert not (cache / "models" / WEIGHTS).exists()
    assert (cache / "models" / kept.GGUF_NAME).exists() and (cache / "reference" / BANK).exists()


def test_all_are_removed_and_nothing_of_others(cache, capsys):
    code, said, _ = call("models", "--clear", capsys=capsys)
    assert code == 0 and said.count("\nremoved ") == 4
    assert sorted(path.name for path in (cache / "models").iterdir()) == ["mine", "other.gguf"]
    assert (cache / "models" / "mine" / "some.bin").exists()
    assert list((cache / "reference").iterdir()) == []
    code, said, _ = call("models", capsys=capsys)
    assert code == 0 and "nothing is kept there" in said


def test_a_link_is_removed_and_not_what_it_leads_to(cache, capsys, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    (cache / "models" / ("smollm2-135m-" + "0c" * 8)).symlink_to(theirs)
    assert call("models", "--clear", capsys=capsys)[0] == 0
    assert (theirs / "thesis.tex").exists()


@pytest.mark.parametrize("arguments", [("--clear", "smollm2-135m-0a0a0a0a0a0a0a0"), ("--clear", "../theirs"), ("gpt2",)])
def test_other_names_are_refused(cache, capsys, arguments):
    code, _, said = call("models", *arguments, capsys=capsys)
    assert code != 0 and "expected" in said and "Traceback" not in said
    assert ("Did you mean" in said) == arguments[-1].startswith("smollm2")
    assert (cache / "models" / WEIGHTS).exists()


def test_an_empty_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("BASIN_LENS_CACHE", str(tmp_path / "none"))
    code, said, _ = call("models", capsys=capsys)
    assert code == 0 and "nothing is kept there" in said and not (tmp_path / "none").exists()
