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
from tests.conftest import LEFT_OUT

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "basin_lens").rglob("*.py"))
PAGES = ROOT / "basin_lens" / "views" / "pages"
TEMPLATES = [str(path.relative_to(ROOT)) for folder in ("templates", "explorer") for path in (PAGES / folder).iterdir()]

WRITERS = {"files.py", "locks.py"}


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
        if not spelled.search(text):
            continue
        docs = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        code = text
        for doc in docs:
            code = code.replace(doc, "") if len(doc) > 20 else code
        assert not spelled.search(code), path


def test_only_the_tables_room_touches_attrs():
    """Pandas drops `attrs` here and there; the functions of `basin_lens.tables` do not."""
    for path in SOURCES:
        if path.parent.name == "tables":
            continue
        text = path.read_text(encoding="utf-8")
        if "attrs" not in text:
            continue
        lines = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr == "attrs"]
        assert not lines, f"{path}, lines {lines}: use select, assign, merge, concat or with_provenance of basin_lens.tables"


def test_a_plain_pytest_leaves_out_every_marker_and_ci_runs_them():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    names = {line.split(":")[0] for line in settings["markers"]} - {"many"}  # it marks others as slow, and leaves out none itself
    chosen = settings["addopts"][settings["addopts"].index("-m") + 1]
    assert {part.removeprefix("not ") for part in chosen.split(" and ")} == names
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert set(re.search(r'^LEFT_OUT = "([\w ]+)"', sessions, re.M)[1].split(" or ")) == names == LEFT_OUT
    assert "pytest -q -m {shlex.quote(LEFT_OUT)}; tests=$?; wait $beside && exit $tests" in sessions
    assert re.search(r"nox -s ci$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    whole = re.search(r"^def ci\(.*?(?=^@nox)", sessions, re.M | re.S)[0]
    assert all(f"    {part}(session" in whole for part in ("run_plain", "run_marked", "run_notebooks", "run_tests_with_3_9"))
    assert "beside=LINT" in whole


def test_the_import_contracts_know_every_room():
    """A room that no contract names would import what it likes."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract for contract in contracts if contract.get("containers") == ["basin_lens"])
    assert layers["type"] == "layers" and layers["exhaustive"] is True
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


WRITE_TO_FIRST = {
    "savefig",
    "to_csv",
    "to_parquet",
    "to_json",
    "to_html",
    "to_excel",
    "to_feather",
    "to_hdf",
    "to_pickle",
    "tofile",
}
WRITE_ALWAYS = {"write_text", "write_bytes", "save_file", "write_table", "copyfile", "copy2", "copytree", "move", "savez", "imsave"}
WRITE_IN = {("json", "dump"), ("np", "save"), ("np", "savetxt"), ("numpy", "save"), ("os", "replace"), ("shutil", "copy")}
# Any of these words, wherever it stands: most files have none, and need not be read further.
MAY_WRITE = re.compile(
    rf"\b({'|'.join([*WRITE_TO_FIRST, *WRITE_ALWAYS, 'open', 'fdopen', 'ZipFile', 'Unfinished'])}"
    rf"|({'|'.join(sorted({owner for owner, _ in WRITE_IN}))})\.({'|'.join(sorted({name for _, name in WRITE_IN}))}))\b"
)


def writes(call: ast.Call, buffers: set[str]) -> bool:
    """Whether a call writes to a file: by its name, and by the mode of what it opens. Buffers in memory are no files."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
    if name in WRITE_TO_FIRST:
        targets = [*call.args[:1], *(word.value for word in call.keywords if word.arg in ("path_or_buf", "path", "fname"))]
        return any(not (isinstance(target, ast.Name) and target.id in buffers) for target in targets)
    if name in ("open", "fdopen", "ZipFile") and owner != "os":
        modes = [one.value for one in (*call.args[:2], *(word.value for word in call.keywords)) if isinstance(one, ast.Constant)]
        return any(isinstance(mode, str) and re.fullmatch("[rwaxbt+]{1,4}", mode) and set(mode) & set("wax+") for mode in modes)
    if (owner, name) == ("os", "open"):
        return "O_WRONLY" in ast.unparse(call) or "O_RDWR" in ast.unparse(call)
    return name in WRITE_ALWAYS or (owner, name) in WRITE_IN


def fills(function: ast.FunctionDef) -> bool:
    """Whether a function is handed a path that `basin_lens.files` made, and puts into its place when it is filled: mypy holds every
    caller to that."""
    given = [*function.args.args, *function.args.kwonlyargs]
    return any(one.annotation is not None and ast.unparse(one.annotation).split(".")[-1] == "Unfinished" for one in given)


def unattended(tree: ast.Module) -> list[int]:
    """Lines that write, outside of what `write_file` is given to call and of what fills an unfinished file or folder."""
    found: list[int] = []

    def visit(node: ast.AST, buffers: set[str], given: set[str]) -> None:
        if isinstance(node, ast.FunctionDef):
            if node.name in given or fills(node):
                return
            calls = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
            given = given | {
                arg.id
                for one in calls
                if getattr(one.func, "id", getattr(one.func, "attr", "")) == "write_file"
                for arg in one.args[1:]
                if isinstance(arg, ast.Name)
            }
            buffers = {
                target.id
                for one in ast.walk(node)
                if isinstance(one, ast.Assign) and ast.unparse(one.value).endswith("BytesIO()")
                for target in one.targets
                if isinstance(target, ast.Name)
            }
        if isinstance(node, ast.Call):
            if getattr(node.func, "id", getattr(node.func, "attr", "")) == "write_file":
                return
            if writes(node, buffers):
                found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, buffers, given)

    visit(tree, set(), set())
    return found


def test_nothing_but_the_files_room_writes():
    for path in SOURCES:
        if path.name in WRITERS and path.parent.name == "basin_lens":
            continue
        text = path.read_text(encoding="utf-8")
        if not MAY_WRITE.search(text):
            continue
        tree = ast.parse(text)
        lines = unattended(tree)
        assert not lines, (
            f"{path.relative_to(ROOT)}, lines {lines}: write through basin_lens.files, or what it hands you (Unfinished)"
        )
        made = [
            node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Unfinished")
        ]
        assert not made, f"{path.relative_to(ROOT)}, lines {made}: only basin_lens.files makes what is unfinished"


@pytest.mark.parametrize(
    ("code", "is_a_writer"),
    [
        ("path.write_text(text)", True),
        ("with open(path, 'w') as file: file.write(text)", True),
        ("with path.open('ab') as file: file.write(text)", True),
        ("with path.open(mode='r+b') as file: file.write(text)", True),
        ("figure.savefig(path)", True),
        ("table.to_csv(path)", True),
        ("json.dump(facts, file)", True),
        ("def f():\n    drawn = io.BytesIO()\n    figure.savefig(drawn)", False),
        ("text = table.to_csv(index=False)", False),
        ("with path.open() as file: file.read()", False),
        ("with path.open('rb') as file: file.read()", False),
        ("write_file(path, lambda place: figure.savefig(place))", False),
        ("def f():\n    def fill(place): place.write_bytes(b'')\n    write_file(path, fill)", False),
        ("def f(folder: Unfinished):\n    (folder / 'a').write_bytes(b'')", False),
        ("def f(folder: Path):\n    (folder / 'a').write_bytes(b'')", True),
    ],
)
def test_writers_are_recognized(code, is_a_writer):
    assert bool(unattended(ast.parse(code))) == is_a_writer


def test_no_file_has_outgrown_its_room():
    long = {path.name: count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450}
    assert not long, "a stage that outgrows about 400 lines becomes a folder"


@pytest.mark.slow
def test_package_data_is_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # no setuptools in this environment: build with isolation
        command.remove("--no-build-isolation")
        subprocess.run(command, capture_output=True, text=True, check=True)
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("basin_lens/py.typed", *TEMPLATES, "basin_lens/data/passages/fiction.txt"):
        assert needed in names
    assert not [name for name in names if name.startswith("tests")]


def test_no_benchmark_bears_a_name_of_the_standard_library():
    """A script's folder comes first on the path: the scripts beside it would import it in place of Python's own."""
    assert not {path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")} & sys.stdlib_module_names


def test_every_test_of_a_hooked_transformer_runs_in_its_lane():
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    rooms = re.search(r'^MEETS_TRANSFORMER_LENS = "(.*)"$', sessions, re.M)[1].split()
    tests = [path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    marked = re.compile(r"^@hooked_lane$|, marks=hooked_lane\)", re.M)
    hooked = [path for path in tests if marked.search((ROOT / "tests" / path).read_text(encoding="utf-8"))]
    assert len(hooked) > 8
    assert [path for path in hooked if not path.startswith(tuple(rooms))] == []
