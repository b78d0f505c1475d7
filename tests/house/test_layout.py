"""Rooms, public names, packaging: what can drift is tested."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import basin_lens as bl

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "basin_lens").rglob("*.py"))


def test_import_contracts_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_imports_neither_torch_nor_pandas():
    code = "import sys, basin_lens; print([m for m in ('torch', 'pandas', 'transformer_lens', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    for name in bl.__all__:
        assert getattr(bl, name) is not None
    assert set(dir(bl)) >= set(bl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bl.nonsense  # noqa: B018


def test_public_docstrings_have_their_parts():
    for thing in (bl.load_model, bl.analyze, bl.neighborhood, bl.Passage, bl.Capture.from_texts, bl.views.token_view):
        assert "Args:" in thing.__doc__, thing
        assert "Raises:" in thing.__doc__, thing


def test_studies_are_public_and_documented():
    assert "studies" in bl.__all__
    studies = bl.studies
    assert studies.STUDIES == ("importance", "linguistic", "layers", "codelength", "robustness")
    for name in studies.__all__:
        assert getattr(studies, name) is not None
    functions = [getattr(studies, f"study_{name}") for name in studies.STUDIES]
    for function in (*functions, studies.measure, studies.summarize, bl.stats.guide_tests):
        for part in ("Args:", "Returns:", "Raises:", "Example:"):
            assert part in function.__doc__, (function, part)
        for name in inspect.signature(function).parameters:
            assert re.search(rf"\b{name}\b", function.__doc__), (function, name)
    for part in ("Args:", "Example:"):
        assert part in studies.Contrast.__doc__
    for part in ("Args:", "Raises:"):
        assert part in studies.Study.save.__doc__


def test_only_the_model_room_spells_hook_names_and_block_attributes():
    spelled = re.compile(r"hook_resid|hook_pattern|hook_in\b|hook_out\b|model\.blocks\b|transformer_lens|\.attn\b|bos_token")
    for path in SOURCES:
        if path.parent.name == "model":
            continue
        text = path.read_text(encoding="utf-8")
        docs = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        code = text
        for doc in docs:
            code = code.replace(doc, "") if len(doc) > 20 else code
        assert not spelled.search(code), path


def test_a_plain_pytest_leaves_out_every_marker_and_ci_runs_them():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    names = {line.split(":")[0] for line in settings["markers"]}
    chosen = settings["addopts"][settings["addopts"].index("-m") + 1]
    assert {part.removeprefix("not ") for part in chosen.split(" and ")} == names
    run = re.search(r'-m "([\w ]+)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert set(run[1].split(" or ")) == names


def test_the_import_contracts_know_every_room():
    """A room that no contract names would import what it likes."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract for contract in contracts if contract["type"] == "layers")
    assert layers["exhaustive"] is True and layers["containers"] == ["basin_lens"]
    named = {room.strip("() ") for layer in layers["layers"] for room in layer.split("|")}
    there = {path.stem for path in (ROOT / "basin_lens").glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in (ROOT / "basin_lens").glob("*/__init__.py")}
    assert there <= named
    kept_out = [contract["source_modules"] for contract in contracts if "transformer_lens" in contract.get("forbidden_modules", ())]
    above = {room for room in there if (ROOT / "basin_lens" / room).is_dir()} - {"model", "data"}
    assert {f"basin_lens.{room}" for room in above} == {room for rooms in kept_out for room in rooms}


def test_no_pickle():
    for path in SOURCES:
        assert not re.search(r"\bpickle\b|torch\.load\(|torch\.save\(", path.read_text(encoding="utf-8")), path


def test_no_file_has_outgrown_its_room():
    long = {path.name: count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450}
    assert not long, "a stage that outgrows about 400 lines becomes a folder"


def test_package_data_is_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # no setuptools in this environment: build with isolation
        command.remove("--no-build-isolation")
        subprocess.run(command, capture_output=True, text=True, check=True)
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("basin_lens/py.typed", "basin_lens/views/report.html", "basin_lens/data/passages/fiction.txt"):
        assert needed in names
    assert not [name for name in names if name.startswith("tests")]
