"""What README, CONTRIBUTING and the pages of docs/ say of the package, held against the package."""

import ast
import re
from pathlib import Path

import pytest
import typer.main

import basin_lens as bl
from basin_lens.cli.app import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demos" / "README.md"]
OLD = "before the statistics were mended"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.S)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", text_of(ROOT / page)):
        if not target.startswith(("https://", "http://")):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", names(PAGES))
def test_python_lines_can_be_read_and_their_names_are_there(page):
    for block in python_blocks(ROOT / page):
        for node in ast.walk(ast.parse(block)):
            path = attribute_path(node)
            if path[:1] == ["bl"]:
                thing = bl
                for name in path[1:]:
                    thing = getattr(thing, name)


def attribute_path(node: ast.AST) -> list[str]:
    """`bl.views.token_view` as its names; [] for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := attribute_path(node.value)):
        return [*before, node.attr]
    return []


@pytest.mark.many
@pytest.mark.parametrize("page", names(PAGES))
def test_commands_and_their_options_are_there(page):
    for line in re.findall(r"basin-lens ([a-z][^`\n#]*)", text_of(ROOT / page)):
        words = line.split()
        command = typer.main.get_command(app)
        while words and hasattr(command, "list_commands"):
            context = typer.Context(command)
            assert words[0] in command.list_commands(context), line
            command = command.get_command(context, words.pop(0))
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in options, line


@pytest.mark.parametrize("page", names(PAGES))
def test_scripts_and_tests_that_pages_name_are_there(page):
    for path in re.findall(r"\btests/[\w/]+\.py", text_of(ROOT / page)):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_keeps_its_two_commands():
    lines = text_of(README).splitlines()
    assert len(lines) <= 120
    assert "    pip install '.[test]' && pytest" in lines
    assert "    pip install . && basin-lens demo" in lines


def findings() -> list[str]:
    section = text_of(README).split("## What we found, and what not\n")[1].split("\n## ")[0]
    return [re.sub(r"\s+", " ", item) for item in re.split(r"^- ", section, flags=re.M)[1:]]


def test_the_readme_has_at_most_five_findings_each_from_one_section_with_its_mark():
    """A finding is replaced in its section and here; a section whose figures are older than the mended statistics is marked here too."""
    sections = [section for page in BENCHMARKS.glob("*.md") for section in text_of(page).split("\n## ")]
    assert 1 <= len(findings()) <= 5
    for finding in findings():
        wanted = set(NUMBER.findall(finding))
        assert wanted, finding
        found = [section for section in sections if wanted <= set(NUMBER.findall(section))]
        assert len(found) == 1, (finding, wanted)
        assert (OLD in found[0].lower()) == (OLD in finding.lower()), finding


def test_every_page_of_figures_has_command_date_commit_and_machine():
    for page in BENCHMARKS.glob("*.md"):
        text = text_of(page)
        if page.name == "README.md":
            assert set(re.findall(r"\]\((\w+\.md)\)", text)) == {other.name for other in BENCHMARKS.glob("*.md")} - {"README.md"}
            continue
        assert re.search(r"`(basin-lens|python|pytest|merge|\.ci/run)\b", text), page.name
        assert re.search(r"20\d\d-\d\d-\d\d", text), page.name
        assert re.search(r"commit [0-9a-f]{7}\b", text), page.name
        assert "2 cores" in text, page.name


def test_pages_name_every_analyzer_and_every_study():
    scores, studies = text_of(ROOT / "docs" / "scores.md"), text_of(ROOT / "docs" / "studies.md")
    for analyzer in {type(one).__name__ for one in bl.analyzers.default_analyzers()} ^ {one.__name__ for one in bl.ANALYZERS}:
        assert f"`{analyzer}`" in scores, analyzer
    for study in bl.studies.STUDIES:
        assert f"| `{study}` |" in studies, study


def test_the_map_has_every_room():
    text = text_of(ROOT / "CONTRIBUTING.md")
    for path in (ROOT / "basin_lens").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"`{path.name}/`" in text, path.name
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in text, path.name


def test_the_citation_has_the_version():
    assert f"version: {bl.__version__}\n" in text_of(ROOT / "CITATION.cff")
